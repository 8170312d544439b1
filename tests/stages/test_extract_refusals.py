"""Inputs that extraction refuses: other settings, weights and sources, foreign folders, damage."""

import json
import shutil

import pytest

from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import DamageError, ManifestError, MismatchError, SourceError, TeacherError, command
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.estimate_targets import estimate_targets
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.teachers.spelling import teacher_settings
from tests.conftest import contents, edit_manifest


def test_names_of_a_hostile_shard_set_lead_nowhere(target_root, tmp_path, extract_settings):
    source, precious = tmp_path / "shards", tmp_path / "precious.tar"
    shutil.copytree(target_root / "shards", source)
    shutil.copy(source / "tars/000000.tar", precious)
    units = json.loads((source / "manifest.json").read_text())["units"]
    unit = units.pop("000000")
    units["../../precious"] = {
        **unit,
        "files": {f"tars/../../precious.{end}": unit["files"][f"tars/000000.{end}"] for end in ("tar", "json")},
    }
    edit_manifest(source, units=units)
    before = contents(tmp_path)
    with pytest.raises(ManifestError, match=r"units\.\.\./\.\./precious") as caught:
        extract_targets(source, tmp_path / "set", extract_settings(), report=Silent())
    assert caught.value.where == str(source / "manifest.json")
    assert contents(tmp_path) == before


def test_shards_without_an_image_are_refused(tmp_path, extract_settings):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"text")
    settings, shards = extract_settings(), tmp_path / "shards"
    with pytest.raises(SourceError, match="decoded"):
        build_shard_set(tmp_path / "photos", shards, settings.shard, report=Silent())
    with pytest.raises(SourceError, match="holds no image") as caught:
        extract_targets(shards, tmp_path / "set", settings, report=Silent())
    assert caught.value.where == str(shards)
    assert not (tmp_path / "set").exists()
    with pytest.raises(SourceError, match="holds no image"):
        estimate_targets(shards, settings, Silent())


def test_damaged_images_name_their_own_remedy(copy, photos, extract_settings):
    path = copy / "images/000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        extract_targets(photos, copy, extract_settings(views=3), report=Silent())
    assert f"cae2pipe verify {copy} --repair" in caught.value.fix


@pytest.mark.parametrize("existed", [False, True])
def test_what_fails_before_anything_is_written_leaves_nothing(target_root, tmp_path, extract_settings, existed):
    out = tmp_path / "new" / "set"
    if existed:
        out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TeacherError):
        extract_targets(target_root / "shards", out, extract_settings(teacher={"weights": "none"}), report=Silent())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("over", "field"),
    [
        ({"codec": {"fidelity": 0.99}}, "settings.codec.fidelity"),
        ({"codec": {"name": "int8"}}, "settings.codec.name"),
        ({"view": {"quality": 80}}, "settings.view.quality"),
        ({"seed": 1}, "settings.seed"),
        ({"teacher": {"quick_gelu": True}}, "teacher"),
    ],
)
def test_other_settings_are_refused_by_name(copy, photos, extract_settings, over, field):
    before = contents(copy)
    with pytest.raises(MismatchError) as caught:
        extract_targets(photos, copy, extract_settings(**over), report=Silent())
    assert field in caught.value.what
    assert caught.value.fix
    assert contents(copy) == before


@pytest.mark.parametrize("given", ["clip-b16", "timm:vit_base_patch14_dinov2.lvd142m", "lite0@my weights.pth"])
def test_another_teacher_is_refused_before_it_is_loaded(copy, photos, given):
    """Its weights are not here. What the set's own teacher has set is not looked for in it."""
    chosen = ExtractSettings(teacher=teacher_settings(given))
    with pytest.raises(MismatchError, match="was made with the teacher open_clip:tiny") as caught:
        extract_targets(photos, copy, chosen, report=Silent())
    assert caught.value.fix.startswith("--teacher open_clip:tiny resumes it")
    assert f"`{command('extract-targets', copy, '--teacher', given, '--add')}`" in caught.value.fix


def test_other_weights_are_refused(copy, photos, extract_settings, teacher_file, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(teacher_file)
    state["visual.class_embedding"] = state["visual.class_embedding"] + 1e-3
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="weights"):
        extract_targets(
            photos, copy, extract_settings(teacher={"weights": str(tmp_path / "other.safetensors")}), report=Silent()
        )


def test_a_run_as_source_is_refused(trained_run, tmp_path, extract_settings):
    with pytest.raises(SourceError, match="neither a shard set nor a target set"):
        extract_targets(trained_run(), tmp_path / "set", extract_settings(), report=Silent())


def test_a_foreign_folder_is_left_as_it_is(photos, tmp_path, extract_settings):
    files = {"thesis.tex": b"x", "views/.tmp-draft": b"y"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=r"thesis\.tex"):
        extract_targets(photos, tmp_path, extract_settings(), report=Silent())
    with pytest.raises(ManifestError, match=r"thesis\.tex"):
        build_shard_set(photos, tmp_path, extract_settings().shard, report=Silent())
    assert contents(tmp_path) == files


def test_another_source_is_refused(copy, tmp_path, extract_settings):
    from tests.conftest import write_photos

    other = write_photos(tmp_path / "other", classes=3, each=50, seed=1)
    shards = build_shard_set(other, tmp_path / "shards", extract_settings().shard, report=Silent())
    with pytest.raises(MismatchError, match="000000"):
        extract_targets(shards.root, copy, extract_settings(), report=Silent())


def test_degenerate_teachers_stop_the_run(photos, tmp_path, extract_settings, teacher_file):
    from safetensors.torch import load_file, save_file

    state = load_file(teacher_file)
    state["visual.proj"] = state["visual.proj"] * float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(TeacherError):
        extract_targets(
            photos,
            tmp_path / "set",
            extract_settings(teacher={"weights": str(tmp_path / "nan.safetensors")}),
            report=Silent(),
        )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_a_damaged_source_shard_is_named(photos, tmp_path, extract_settings, damage, workers):
    shards = build_shard_set(photos, tmp_path / "shards", extract_settings().shard, report=Silent())
    tar = shards.shards[1].path
    data = bytearray(tar.read_bytes())
    if damage == "deleted":
        tar.unlink()
    elif damage == "cut":
        tar.write_bytes(data[: len(data) // 2])
    else:
        data[shards.index(shards.shards[1])[3].offset + 9] ^= 255
        tar.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        extract_targets(shards.root, tmp_path / "set", extract_settings(speed={"workers": workers}), report=Silent())
    assert "Traceback" not in str(caught.value)
    assert "000001.tar" in caught.value.where
    assert "--repair" in caught.value.fix
