import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cae2pipe.artifacts.box import TargetsBox, open_box
from cae2pipe.config.base import build
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import DamageError, ManifestError, MismatchError, SourceError, TeacherError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets import rendering
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import load_teacher
from tests.conftest import contents, edit_manifest, snapshot


@pytest.fixture
def copy(target_root, tmp_path) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(target_root, root)
    return root


def stores(root: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in contents(root).items() if name.startswith(("views/", "latents/", "codec.zarr/"))
    }


def test_the_set_is_complete_and_says_what_it_holds(target_root):
    targets = TargetSet(target_root)
    assert targets.box.complete
    assert sorted(targets.stores) == [f"v{v:02d}/{s:06d}" for v in range(2) for s in range(3)]
    assert (targets.images, targets.views) == (150, 2)
    assert targets.classes == ["class0", "class1", "class2"]
    assert targets.fidelity()["mean"] >= 0.9988
    assert targets.bytes_per_view()["fp16"] == 2 * 17 * 17


def test_a_second_run_does_nothing_and_says_so(copy, photos, extract_settings):
    before = snapshot(copy)
    report = Silent()
    extract_targets(photos, copy, extract_settings(), report)
    assert snapshot(copy) == before
    assert any("nothing to do" in line for line in report.lines)


def test_workers_and_a_shard_set_as_source_change_nothing(target_root, photos, tmp_path, extract_settings):
    settings = extract_settings(speed={"workers": 2})
    shards = build_shard_set(photos, tmp_path / "shards", settings.shard, Silent())
    extract_targets(shards.root, tmp_path / "set", settings, Silent())
    assert stores(tmp_path / "set") == stores(target_root)
    assert (tmp_path / "set" / "manifest.json").read_bytes() == (target_root / "manifest.json").read_bytes()


def test_the_number_of_cores_changes_nothing(target_root, photos, tmp_path, extract_settings):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        extract_targets(photos, tmp_path / "set", extract_settings(), Silent())
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "set") == contents(target_root)


@pytest.mark.parametrize("pixels", ["stored", "replayed"])
def test_how_many_views_are_rendered_at_once_changes_nothing(
    target_root, stored_root, photos, tmp_path, extract_settings, monkeypatch, pixels
):
    monkeypatch.setattr(rendering, "VIEWS_AT_ONCE", 1)
    extract_targets(photos, tmp_path / "set", extract_settings(view={"pixels": pixels}), Silent())
    assert contents(tmp_path / "set") == contents(stored_root if pixels == "stored" else target_root)


def without_defaults(settings: ExtractSettings) -> ExtractSettings:
    """The settings as of a command that gives neither views nor a fidelity."""
    values = settings.model_dump(mode="json")
    del values["views"], values["codec"]["fidelity"]
    return build(ExtractSettings, values, "test")


def test_a_set_of_other_defaults_is_resumed_with_its_own(copy, photos, extract_settings):
    begun, given = extract_settings(), without_defaults(extract_settings())
    assert (given.views, given.codec.fidelity) != (begun.views, begun.codec.fidelity)
    before = contents(copy)
    (copy / "latents/v01/000001.zarr/norms/c/0/0").unlink()
    report, said = Silent(), []
    report.log = said.append
    extract_targets(photos, copy, given, report)
    assert contents(copy) == before
    assert "as this set was begun: --views 2 --fidelity 0.999" in said
    # What is given counts.
    with pytest.raises(MismatchError, match=r"codec\.fidelity"):
        extract_targets(photos, copy, extract_settings(codec={"fidelity": given.codec.fidelity}), Silent())


def test_a_fidelity_that_means_nothing_to_a_codec_is_not_asked_for_again(photos, tmp_path, extract_settings):
    extract_targets(photos, tmp_path / "set", extract_settings(codec={"name": "fp16"}, views=1), Silent())
    given = without_defaults(extract_settings(codec={"name": "fp16"}))
    more = given.model_copy(update={"views": 2})
    more.model_fields_set.add("views")
    extract_targets(photos, tmp_path / "set", more, Silent())
    assert TargetSet(tmp_path / "set").views == 2


@pytest.mark.parametrize("lost", ["images/000001.tar", "latents/v01/000001.zarr"])
def test_only_what_was_deleted_is_made_again_and_alike(copy, photos, extract_settings, lost):
    before = snapshot(copy)
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    extract_targets(photos, copy, extract_settings(), Silent())
    after = snapshot(copy)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    changed = {name for name in after if after[name][1] != before[name][1]}
    assert changed
    assert all(name.startswith(lost.removesuffix(".tar")) for name in changed)


@pytest.mark.parametrize("damage", ["folder gone", "chunk gone", "bit flipped", "metadata changed", "a file instead"])
def test_a_lost_calibration_is_noticed_and_restored(copy, photos, extract_settings, damage):
    before, folder = contents(copy), copy / "codec.zarr"
    if damage in ("folder gone", "a file instead"):
        shutil.rmtree(folder)
        if damage == "a file instead":
            folder.write_bytes(b"")
    elif damage == "chunk gone":
        (folder / "mean/c/0").unlink()
    else:
        path = folder / ("basis/c/0/0" if damage == "bit flipped" else "mean/zarr.json")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamageError, match="calibration"):
        TargetSet(copy)
    extract_targets(photos, copy, extract_settings(), Silent())
    assert contents(copy) == before


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
        extract_targets(source, tmp_path / "set", extract_settings(), Silent())
    assert caught.value.where == str(source / "manifest.json")
    assert contents(tmp_path) == before


def test_views_can_be_added_later(target_root, photos, tmp_path, extract_settings):
    grown = tmp_path / "grown"
    extract_targets(photos, grown, extract_settings(views=1), Silent())
    assert TargetSet(grown).views == 1
    first = stores(grown)
    extract_targets(photos, grown, extract_settings(views=2), Silent())
    assert stores(grown) == stores(target_root)
    assert first.items() <= stores(grown).items()


@pytest.mark.parametrize("crash_at", [1, 3, 5])
def test_a_broken_off_run_goes_on_to_the_same_bytes(
    target_root, photos, tmp_path, extract_settings, monkeypatch, crash_at
):
    out = tmp_path / "set"
    real_add, count = TargetsBox.add, 0

    def add(self: TargetsBox, name: str, unit: dict) -> None:
        nonlocal count
        count += 1
        if count == crash_at:
            raise KeyboardInterrupt
        real_add(self, name, unit)

    monkeypatch.setattr(TargetsBox, "add", add)
    with pytest.raises(KeyboardInterrupt):
        extract_targets(photos, out, extract_settings(), Silent())
    monkeypatch.undo()
    extract_targets(photos, out, extract_settings(), Silent())
    assert contents(out) == contents(target_root)


def test_the_journal_of_a_killed_run_counts(target_root, photos, tmp_path, extract_settings, monkeypatch):
    out, save = tmp_path / "set", TargetsBox.save
    with monkeypatch.context() as patch:
        # A SIGKILL leaves the journal: the manifest is never written.
        patch.setattr(TargetsBox, "save", lambda self, complete=None: None if self.units else save(self))
        extract_targets(photos, out, extract_settings(), Silent())
    assert open_box(out).units.keys() == open_box(target_root).units.keys()
    assert not open_box(out).complete


def test_fp16_targets_are_the_live_teachers(photos, tmp_path, extract_settings):
    settings = extract_settings(codec={"name": "fp16", "calibration": 64}, views=1)
    extract_targets(photos, tmp_path / "set", settings, Silent())
    targets = TargetSet(tmp_path / "set")
    teacher = load_teacher(settings.teacher, torch.device("cpu"))
    reader = targets.reader("v00/000001")
    block = reader.block(1)
    pixels = torch.from_numpy(targets.pixels(block)).permute(0, 3, 1, 2)
    live = teacher(pixels).tokens
    stored = targets.layout.codec.decode(as_tensors(block.arrays))
    norms = torch.from_numpy(block.arrays["norms"]).float().unsqueeze(-1)
    assert torch.equal(stored, torch.nn.functional.normalize(live, dim=-1).half().float())
    torch.testing.assert_close(stored * norms, live, rtol=2e-3, atol=1e-3)


def test_the_draws_kept_recreate_the_stored_view(stored_root, photos, extract_settings):
    from cae2pipe.images.decode import decode_rgb
    from cae2pipe.images.views import ViewDraw, encode_jpeg, render_view
    from cae2pipe.shards.shard_set import ShardSet

    shards = ShardSet.open(stored_root / "shards")
    reader = TargetSet(stored_root).reader("v01/000000")
    original = shards.read(shards.shards[0], 5, 6)[0]
    draw = ViewDraw.from_row(reader.draws()[5])
    image = decode_rgb(original.data, where="test")
    settings = extract_settings().view
    assert reader.keys()[5] == original.key
    assert encode_jpeg(render_view(image, draw, settings), settings) == reader.jpegs(0)[5]
    assert (draw.source_height, draw.source_width) == (image.height, image.width)


def test_the_teacher_sees_what_is_cut_from_the_images_kept(target_root, photos, extract_settings, monkeypatch):
    """Of every view, what stage 1 gives the teacher is, bit for bit, what the set gives to those who load it."""
    from cae2pipe.shards.shard_set import ShardSet
    from cae2pipe.targets.rendering import Renderer, Task

    targets, settings = TargetSet(target_root), extract_settings()
    shards = ShardSet.open(target_root / "shards")
    for shard in shards.shards:
        for block in range(-(-shard.samples // 64)):
            rendered = Renderer(shards, [Task(shard, block, (0, 1))], settings.view, settings.seed)[0]
            for view in (0, 1):
                held = targets.reader(f"v{view:02d}/{shard.name}").block(block)
                assert held.keys == rendered.keys
                assert held.jpegs == rendered.kept
                pixels = torch.from_numpy(targets.pixels(held)).permute(0, 3, 1, 2)
                assert torch.equal(pixels, rendered.pixels[view])
                draws = held.draws
                assert (draws[:, -2:].min(axis=1) <= settings.view.kept_side).all()  # photographs of up to 59


def test_stored_and_replayed_views_are_not_mistaken_for_each_other(
    target_root, stored_root, photos, tmp_path, extract_settings
):
    for root, asked in ((target_root, "stored"), (stored_root, "replayed")):
        before = contents(root)
        there = {"stored": "replayed", "replayed": "stored"}[asked]
        with pytest.raises(MismatchError, match=f"views are {there}, and {asked} ones") as caught:
            extract_targets(photos, root, extract_settings(view={"pixels": asked}), Silent())
        assert f"--set view.pixels={there}" in caught.value.fix
        assert contents(root) == before
    # Sets from before views were replayed do not say so, and are those of stored views.
    assert "pixels" not in open_box(stored_root).identity["settings"]["view"]
    assert TargetSet(stored_root).replayed is None


def test_views_are_added_from_the_images_kept(photos, tmp_path, extract_settings, monkeypatch):
    """Reduced anew, an image could come out otherwise with another version of a library."""
    extract_targets(photos, tmp_path / "set", extract_settings(views=1), Silent())
    rendering = importlib.import_module("cae2pipe.targets.rendering")
    monkeypatch.setattr(rendering, "keep_image", None)
    monkeypatch.setattr(rendering, "decode_rgb", None)
    extract_targets(photos, tmp_path / "set", extract_settings(views=3), Silent())
    assert TargetSet(tmp_path / "set").views == 3


def test_images_longer_than_a_jpeg_can_be_are_reduced(tmp_path, extract_settings):
    (tmp_path / "images" / "class").mkdir(parents=True)
    for name, size in (("wide", (65501, 2)), ("tall", (2, 65501)), ("dot", (1, 1))):
        Image.new("RGB", size, "red").save(tmp_path / "images" / "class" / f"{name}.png")
    settings = extract_settings(views=1, codec={"name": "int8", "calibration": 4})
    extract_targets(tmp_path / "images", tmp_path / "set", settings, Silent())
    assert len(TargetSet(tmp_path / "set")) == 3


def test_damaged_images_name_their_own_remedy(copy, photos, extract_settings):
    path = copy / "images/000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        extract_targets(photos, copy, extract_settings(views=3), Silent())
    assert f"cae2pipe verify {copy} --repair" in caught.value.fix


def test_a_view_that_comes_out_otherwise_is_told(stored_root, photos, tmp_path, extract_settings, monkeypatch):
    root = tmp_path / "set"
    shutil.copytree(stored_root, root)
    (root / "views/v01/000001.tar").unlink()
    rendering = importlib.import_module("cae2pipe.targets.rendering")
    real = rendering.encode_jpeg
    monkeypatch.setattr(rendering, "encode_jpeg", lambda image, settings: real(image.rotate(180), settings))
    said: list[str] = []
    report = Silent()
    monkeypatch.setattr(report, "log", said.append)
    extract_targets(photos, root, extract_settings(view={"pixels": "stored"}), report)
    assert [text for text in said if "does not come out as it was" in text and "v01/000001" in text]


def test_the_format_is_that_of_the_version_that_began_the_set(target_root, photos, tmp_path, extract_settings):
    """Older versions refuse what they would misread; sets that they began stay readable for them."""
    assert open_box(target_root).format == 3
    old = tmp_path / "old"
    extract_targets(photos, old, extract_settings(views=1), Silent())
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["digest"]  # which they did not have
    (old / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    extract_targets(photos, old, extract_settings(views=2), Silent())
    assert json.loads((old / "manifest.json").read_text())["format"] == 1
    (old / "manifest.json").write_text(json.dumps({**manifest, "format": 4}))
    with pytest.raises(ManifestError, match="format 4, and this version of cae2pipe reads format 3"):
        TargetSet(old)


def test_attention_is_kept_for_a_vit(target_root):
    attention = TargetSet(target_root).reader("v00/000000").arrays(0, ["attention"])["attention"]
    assert attention.shape == (64, 16)
    assert (attention.max(axis=1) == 255).all()
    assert attention.min() < 255


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
        extract_targets(photos, copy, extract_settings(**over), Silent())
    assert field in caught.value.what
    assert caught.value.fix
    assert contents(copy) == before


def test_other_weights_are_refused(copy, photos, extract_settings, teacher_file, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(teacher_file)
    state["visual.class_embedding"] = state["visual.class_embedding"] + 1e-3
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="weights"):
        extract_targets(
            photos, copy, extract_settings(teacher={"weights": str(tmp_path / "other.safetensors")}), Silent()
        )


def test_a_target_set_as_source_is_refused(target_root, tmp_path, extract_settings):
    with pytest.raises(SourceError, match="not a shard set"):
        extract_targets(target_root, tmp_path / "set", extract_settings(), Silent())


def test_a_foreign_folder_is_left_as_it_is(photos, tmp_path, extract_settings):
    files = {"thesis.tex": b"x", "views/.tmp-draft": b"y"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=r"thesis\.tex"):
        extract_targets(photos, tmp_path, extract_settings(), Silent())
    with pytest.raises(ManifestError, match=r"thesis\.tex"):
        build_shard_set(photos, tmp_path, extract_settings().shard, Silent())
    assert contents(tmp_path) == files


def test_another_source_is_refused(copy, tmp_path, extract_settings):
    from tests.conftest import write_photos

    other = write_photos(tmp_path / "other", classes=3, each=50, seed=1)
    shards = build_shard_set(other, tmp_path / "shards", extract_settings().shard, Silent())
    with pytest.raises(MismatchError, match="000000"):
        extract_targets(shards.root, copy, extract_settings(), Silent())


def test_degenerate_teachers_stop_the_run(photos, tmp_path, extract_settings, teacher_file):
    from safetensors.torch import load_file, save_file

    state = load_file(teacher_file)
    state["visual.proj"] = state["visual.proj"] * float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(TeacherError):
        extract_targets(
            photos, tmp_path / "set", extract_settings(teacher={"weights": str(tmp_path / "nan.safetensors")}), Silent()
        )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_a_damaged_source_shard_is_named(photos, tmp_path, extract_settings, damage, workers):
    shards = build_shard_set(photos, tmp_path / "shards", extract_settings().shard, Silent())
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
        extract_targets(shards.root, tmp_path / "set", extract_settings(speed={"workers": workers}), Silent())
    assert "Traceback" not in str(caught.value)
    assert "000001.tar" in caught.value.where
    assert "--repair" in caught.value.fix


def test_manifests_hold_no_paths_times_or_hosts(target_root):
    text = (target_root / "manifest.json").read_text()
    assert str(target_root) not in text
    assert "/tmp" not in text
    manifest = json.loads(text)
    assert manifest["format"] == 3
    assert manifest["fidelity" if "fidelity" in manifest else "codec"]
