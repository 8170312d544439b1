"""verify --repair: damaged units are rebuilt identically from the source, or the source is refused."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.artifacts.work_share import parse_part
from cae2pipe.cli import app
from cae2pipe.errors import BadInputError, DamageError, MismatchError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.repair import repair
from cae2pipe.stages.verify import verify
from cae2pipe.targets import stored_calibration
from tests.conftest import contents, edit_manifest, snapshot

FILES = [
    "images/000001.tar",
    "images/000002.json",
    "latents/v00/000002.zarr/patches/symbols/c/0/0/0/0",
    "latents/v00/000002.zarr/zarr.json",
    "codec.zarr/patches/basis/c/0/0",
    "shards/tars/000001.tar",
    "shards/tars/000000.json",
    "shards/rejects.jsonl",
    "shards/listing-000.jsonl.gz",
]


@pytest.fixture
def copy(target_root, tmp_path) -> Path:
    shutil.copytree(target_root, tmp_path / "set")
    return tmp_path / "set"


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif not data:
        path.write_bytes(b"x")
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def mended(root: Path, photos: Path, teacher: Path) -> None:
    verification = verify(root, Silent())
    assert verification.problems
    repair(verification, Silent(), source=photos, weights=teacher, device="cpu", workers=0)


@pytest.fixture
def stored(stored_root, tmp_path) -> Path:
    """A set of stored views."""
    shutil.copytree(stored_root, tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize("how", ["deleted", "cut", "changed"])
@pytest.mark.parametrize("name", FILES)
def test_exactly_the_damaged_is_made_again(copy, photos, teacher_file, name, how):
    before = snapshot(copy)
    damage(copy / name, how)
    mended(copy, photos, teacher_file)
    after = snapshot(copy)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert verify(copy, Silent()).problems == []
    # Only its unit has been written, for example the store and the tar of one view of one shard.
    number = next((number for number in ("000000", "000001", "000002") if number in name), name.split("/")[0])
    touched = {path for path in before if before[path][1] != after[path][1]} - {"manifest.json", "shards/manifest.json"}
    assert touched
    assert all(number in path for path in touched)


@pytest.mark.parametrize("folder", ["", "shards"])
def test_what_a_killed_repair_left_unfinished_is_removed(copy, folder):
    before = contents(copy)
    left = copy / folder / "journal" / ".tmp-000000.json"
    left.parent.mkdir()
    left.write_text("{")
    repair(verify(copy, Silent()), Silent())
    assert contents(copy) == before


def test_a_stored_view_is_made_again(stored, photos, teacher_file):
    before = snapshot(stored)
    damage(stored / "views/v01/000001.tar", "changed")
    mended(stored, photos, teacher_file)
    after = snapshot(stored)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    touched = {path for path in before if before[path][1] != after[path][1]} - {"manifest.json"}
    assert touched
    assert all("v01/000001" in path for path in touched)


def test_images_that_come_out_otherwise_are_refused(copy, photos, teacher_file, monkeypatch):
    """Views were cut from these images and seen by the teacher."""
    damage(copy / "images/000001.tar", "deleted")
    before = contents(copy)
    rendering = importlib.import_module("cae2pipe.targets.rendering")
    real = rendering.keep_image
    monkeypatch.setattr(rendering, "keep_image", lambda image, settings: real(image.rotate(180), settings))
    with pytest.raises(DamageError, match="differ from those that views were cut from"):
        mended(copy, photos, teacher_file)
    after = contents(copy)
    assert not json.loads(after.pop("manifest.json"))["complete"]
    assert after == {name: data for name, data in before.items() if name != "manifest.json"}


def test_all_of_it_at_once(copy, photos, teacher_file):
    before = contents(copy)
    for name in FILES:
        damage(copy / name, "changed")
    mended(copy, photos, teacher_file)
    assert contents(copy) == before


def test_a_store_that_contradicts_its_tar(stored, photos, teacher_file):
    """Both files of another set, with matching digests in the manifest: only the content differs."""
    copy = stored
    before = contents(copy)
    tar = copy / "views/v00/000000.tar"
    shutil.copy(copy / "views/v00/000001.tar", tar)
    units = json.loads((copy / "manifest.json").read_text())["units"]
    units["v00/000000"]["files"]["views/v00/000000.tar"] = units["v00/000001"]["files"]["views/v00/000001.tar"]
    edit_manifest(copy, units=units)
    mended(copy, photos, teacher_file)
    assert contents(copy)["views/v00/000000.tar"] == before["views/v00/000000.tar"]
    assert verify(copy, Silent()).problems == []


def test_a_source_that_has_changed_is_refused(copy, photos, tmp_path, teacher_file):
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    victim = other / "class1" / "image007.jpg"
    good = victim.read_bytes()
    for number in range(3):
        damage(copy / f"shards/tars/{number:06d}.tar", "changed")
    before = snapshot(copy)
    victim.write_bytes(good + b"!")
    with pytest.raises(MismatchError, match=r"image007\.jpg has"):
        mended(copy, other, teacher_file)
    victim.unlink()
    with pytest.raises(MismatchError, match="no longer there"):
        mended(copy, other, teacher_file)
    assert snapshot(copy) == before


def test_a_shard_set_beside_the_targets(photos, tmp_path, extract_settings, teacher_file):
    settings = extract_settings(views=1)
    shards = build_shard_set(photos, tmp_path / "shards", settings.shard, report=Silent())
    extract_targets(shards.root, tmp_path / "set", settings, report=Silent())
    before = contents(tmp_path / "set")
    damage(tmp_path / "set/images/000001.tar", "changed")
    with pytest.raises(BadInputError, match="shard set") as caught:
        repair(verify(tmp_path / "set", Silent()), Silent(), weights=teacher_file, device="cpu", workers=0)
    assert "--source" in caught.value.fix
    other = build_shard_set(photos, tmp_path / "other", settings.shard.model_copy(update={"seed": 5}), report=Silent())
    with pytest.raises(MismatchError, match="differs from the one"):
        mended(tmp_path / "set", other.root, teacher_file)
    mended(tmp_path / "set", shards.root, teacher_file)
    assert contents(tmp_path / "set") == before


def test_only_the_asked_is_made(photos, tmp_path, extract_settings, teacher_file):
    """An interrupted set stays partial: repair does not resume it."""
    settings = extract_settings()
    extract_targets(photos, tmp_path / "set", settings, report=Silent(), calibrate_only=True)
    extract_targets(photos, tmp_path / "set", extract_settings(views=1), report=Silent())
    extract_targets(photos, tmp_path / "set", settings, report=Silent(), part=parse_part("1/2"))
    before = contents(tmp_path / "set")
    damage(tmp_path / "set/latents/v01/000000.zarr/patches/norms/c/0/0", "deleted")
    mended(tmp_path / "set", photos, teacher_file)
    assert contents(tmp_path / "set") == before


def test_a_calibration_that_comes_out_otherwise_is_refused(copy, photos, teacher_file, monkeypatch):
    damage(copy / "codec.zarr/patches/mean/c/0", "changed")
    before = snapshot(copy)
    real = stored_calibration.calibrate
    monkeypatch.setattr(
        stored_calibration, "calibrate", lambda unit, *rest, **named: real(unit * 0.999, *rest, **named)
    )
    with pytest.raises(DamageError, match="cannot be reproduced on this machine"):
        mended(copy, photos, teacher_file)
    assert snapshot(copy) == before


def test_the_command_line(copy, photos, teacher_file):
    before = contents(copy)
    damage(copy / "latents/v01/000000.zarr/patches/norms/c/0/0", "changed")
    run = CliRunner().invoke
    result = run(app, ["verify", str(copy)])
    assert result.exit_code == 1
    assert f"cae2pipe verify {copy} --repair" in result.stderr
    result = run(app, ["verify", str(copy), "--repair", "--teacher-weights", str(teacher_file), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert contents(copy) == before
    (copy / "images/stranger.tar").write_bytes(b"x")
    assert run(app, ["verify", str(copy), "--repair"]).exit_code == 1
    assert (copy / "images/stranger.tar").exists()
