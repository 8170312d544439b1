"""Copies: the same bytes on disks and object stores, after any interruption; never a half set that looks whole."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.artifacts import transfer
from cae2pipe.artifacts.artifact import TargetsArtifact, open_artifact
from cae2pipe.artifacts.atomic import remove_any
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.storage import file_size, file_sizes, is_local, put_bytes, read_bytes, remove, to_path
from cae2pipe.artifacts.transfer import MARKS
from cae2pipe.cli import app
from cae2pipe.errors import BadInputError, DamageError, LockedError, ManifestError, MismatchError, SettingsError
from cae2pipe.runtime.progress import Lines, Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages import copy_set as stage
from cae2pipe.stages.copy_set import Copied, Tally, copy_set
from cae2pipe.stages.verify import verify
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents, edit_manifest, write_photos
from tests.faults.short_of_memory import limited

LOST = ["images/000001.tar", "latents/v01/000002.zarr/patches/norms/c/0/0", "shards/tars/000000.tar"]


def held(root: Path) -> dict[str, bytes]:
    """All files but locks."""
    if is_local(root):
        return contents(root)
    return {name: read_bytes(root / name) for name in file_sizes(root) if "/.locks/" not in f"/{name}"}


def store() -> Path:
    """A new folder of an object store."""
    return to_path(f"memory://{uuid.uuid4().hex}/set")


def put(source: Path, out: Path) -> Path:
    """A folder's files at another place, which may be remote."""
    for name, data in contents(source).items():
        if is_local(out):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        else:
            put_bytes(out / name, data)
    return out


def bring(source: Path, out: Path, **options: Any) -> Copied:
    return copy_set(source, out, report=Silent(), **{"workers": 1, **options})


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path) -> Callable[[str], Path]:
    """Makes a new path on a disk or an object store."""
    return lambda name: tmp_path / name if request.param == "disk" else store()


@pytest.mark.parametrize("piece", [1000, transfer.PIECE])
@pytest.mark.parametrize("remote", [False, True])
def test_a_copy_has_the_same_bytes(target_root, place, monkeypatch, remote, piece):
    monkeypatch.setattr(transfer, "PIECE", piece)
    source = put(target_root, store()) if remote else target_root
    before = held(source)
    result = bring(source, out := place("new/set"), workers=3)
    assert held(out) == held(source) == before
    assert (result.kind, result.complete, result.brought) == ("targets", True, result.files)
    assert result.bytes == sum(len(data) for name, data in before.items() if not name.endswith("manifest.json"))
    assert not verify(out, Silent()).problems
    again = bring(source, out)
    assert (again.brought, again.bytes, again.files, again.complete) == (0, 0, result.files, True)
    assert "nothing to copy" in again.summary()
    assert held(out) == before


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_an_interrupted_copy_is_resumed_to_the_same_bytes(target_root, tmp_path_factory, data):
    """Stopped at any of its pieces, some of which are in the middle of a file, once or again and again."""
    out = store() if data.draw(st.booleans()) else tmp_path_factory.mktemp("copy") / "set"
    before = contents(target_root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PIECE", 4000)
        for _ in range(data.draw(st.integers(1, 3))):
            left = data.draw(st.integers(0, 300))
            pieces, moved = itertools.count(), Tally.moved

            def stopped(self: Tally, count: int, pieces=pieces, left=left, moved=moved) -> None:
                if next(pieces) == left:
                    raise KeyboardInterrupt
                moved(self, count)

            patch.setattr(Tally, "moved", stopped)
            with suppress(KeyboardInterrupt):
                bring(target_root, out)
                break
            patch.setattr(Tally, "moved", moved)
            assert not open_artifact(out).units, "readers see nothing of it"
            # Whatever has its final name is right.
            there = {name: data for name, data in held(out).items() if not name.endswith("manifest.json")}
            assert {name: data for name, data in there.items() if MARKS not in name}.items() <= before.items()
        assert bring(target_root, out).complete
    assert held(out) == before


def test_what_has_arrived_is_not_read_again(target_root, place, monkeypatch):
    read: list[str] = []
    real = stage.copy_file

    def copy_file(source, root, relative, **options):
        if relative.startswith("latents/v01"):
            raise KeyboardInterrupt
        read.append(relative)
        real(source, root, relative, **options)

    monkeypatch.setattr(stage, "copy_file", copy_file)
    out = place("set")
    with pytest.raises(KeyboardInterrupt):
        bring(target_root, out)
    first, read[:] = set(read), []
    assert file_sizes(out / MARKS)
    with pytest.raises(ManifestError, match="no finished store"):
        TargetSet(out)
    problem = verify(out, Silent()).problems[0]
    assert "not finished" in problem.what
    assert "cae2pipe copy" in str(problem.fix)
    monkeypatch.setattr(stage, "copy_file", lambda *paths, **options: (read.append(paths[2]), real(*paths, **options)))
    monkeypatch.setattr(stage, "check_file", lambda path, entry, **options: pytest.fail(f"{path} was read"))
    result = bring(target_root, out)
    assert first.isdisjoint(read)
    assert result.brought == len(read) < result.files
    assert held(out) == contents(target_root)


@pytest.mark.parametrize("harm", ["lost", "shorter", "longer", "changed"])
@pytest.mark.parametrize("name", LOST)
def test_what_is_damaged_is_named_and_not_copied(target_root, tmp_path, name, harm):
    source = put(target_root, store())
    data = read_bytes(source / name)
    remove([source / name])
    harmed = {"shorter": data[:-1], "longer": data + b"x", "changed": data[:-1] + bytes([data[-1] ^ 1])}
    if harm in harmed:
        put_bytes(source / name, harmed[harm])
    local = put(target_root, tmp_path / "set")
    (local / name).unlink()
    if harm in harmed:
        (local / name).write_bytes(harmed[harm])
    for origin, out in ((source, tmp_path / "copy"), (local, store())):
        with pytest.raises(DamageError) as caught:
            bring(origin, out, workers=2)
        assert caught.value.where == str(origin / name)
        assert caught.value.fix.startswith(f"`cae2pipe verify {origin}")
        assert file_size(out / name) is None
    put_bytes(source / name, data)
    assert bring(source, tmp_path / "copy").complete


def test_damage_at_the_destination_is_made_good(target_root, place):
    bring(target_root, out := place("set"))
    name = LOST[1]
    data = read_bytes(out / name)
    for wrong, options in ((data[:-1], {}), (data[:-1] + bytes([data[-1] ^ 1]), {"check": True})):
        remove([out / name])
        (out / name).write_bytes(wrong)
        if options:
            assert bring(target_root, out).brought == 0, "sizes are right"
        assert bring(target_root, out, **options).brought == 1
        assert held(out) == contents(target_root)


def test_a_destination_that_holds_something_else_is_left_as_it_is(
    target_root, stored_root, int8_root, make_run, tmp_path
):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    run, other = make_run(), put(int8_root, tmp_path / "int8")
    same = put(target_root, tmp_path / "same")
    manifest = json.loads((same / "manifest.json").read_text())
    manifest["units"]["v00/000001"]["fidelity"]["mean"] /= 2
    edit_manifest(same, units=manifest["units"])
    cases: list[tuple[Path, type[BadInputError], str]] = [
        (tmp_path / "photos", ManifestError, "not empty"),
        (tmp_path / "file", BadInputError, "this is a file"),
        (run, MismatchError, 'its kind is "run"'),
        (other, MismatchError, "holds another set: its recoded is"),
        (same, MismatchError, "its v00/000001 differs"),
        (put(int8_root, store()), MismatchError, "holds another set"),
        (put(tmp_path / "photos", store()), ManifestError, "not empty"),
        (target_root, BadInputError, "is the set itself"),
        (target_root / "copy", BadInputError, "overlap"),
        (target_root.parent, BadInputError, "overlap"),
    ]
    for out, error, said in cases:
        before = held(out)
        folders = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=said):
            bring(target_root, out)
        assert held(out) == before
        assert [path for path in sorted(tmp_path.rglob("*")) if path not in folders and out != tmp_path / "file"] == []


def test_what_is_not_a_set_is_refused(make_run, target_root, tmp_path):
    for source, said in (
        (make_run(), "kind 'run'"),
        (tmp_path, "folders inside|not made by"),
        (tmp_path / "x", "no such"),
    ):
        with pytest.raises(BadInputError, match=said):
            bring(source, tmp_path / "out")
    with pytest.raises(SettingsError, match="has no views"):
        bring(target_root / "shards", tmp_path / "out", views=1)
    assert not (tmp_path / "out").exists()


def test_a_repository_of_the_hub_is_named_its_own_tool(target_root):
    with pytest.raises(BadInputError, match="a commit of every file") as caught:
        bring(target_root, to_path("hf://datasets/someone/targets"))
    assert "hf upload " in str(caught.value.fix)


def test_a_shard_set_that_grows(extract_settings, tmp_path, place):
    photos = write_photos(tmp_path / "photos", classes=2, each=40)
    shard = extract_settings().shard.model_copy(update={"samples": 30})
    shards = build_shard_set(photos, tmp_path / "shards", shard, report=Silent()).root
    out = place("copy")
    assert bring(shards, out).complete
    write_photos(tmp_path / "more", classes=2, each=5, seed=9)
    for path in (tmp_path / "more").rglob("*.jpg"):
        path.rename(photos / path.parent.name / f"more-{path.name}")
    (photos / "class0" / "broken.jpg").write_bytes(b"")
    build_shard_set(photos, shards, shard, report=Silent())
    result = bring(shards, out)
    assert result.complete
    assert held(out) == contents(shards)
    assert 0 < result.brought < result.files / 2


def part(whole: Path, out: Path, kept: Callable[[str], bool]) -> Path:
    """A set as one that is still being made leaves it: units in the manifest, and one in the journal."""
    shutil.copytree(whole, out)
    units = json.loads((whole / "manifest.json").read_text())["units"]
    for name in [name for name in units if not kept(name)]:
        for path in units.pop(name)["files"]:
            (out / path).unlink()
    name, unit = units.popitem()
    edit_manifest(out, units=units, complete=False)
    TargetsArtifact.open(out).add(name, unit)
    return out


def test_a_set_that_grows_and_parts_of_a_set(target_root, tmp_path, place):
    odd = part(target_root, tmp_path / "odd", lambda name: not name.startswith(("v", "i")) or int(name[-1]) % 2 == 1)
    even = part(target_root, tmp_path / "even", lambda name: not name.startswith(("v", "i")) or int(name[-1]) % 2 == 0)
    result = bring(odd, out := place("set"))
    assert not result.complete
    assert "not complete" in result.summary()
    assert open_artifact(out).units == open_artifact(odd).units
    assert cae2pipe.inspect(out)["share_made"] < 1
    assert bring(odd, out).brought == 0
    # The other part brings what is left.
    assert bring(even, out).complete
    assert held(out) == contents(target_root)
    # A part of what is there changes nothing.
    assert bring(odd, out).complete
    assert held(out) == contents(target_root)
    # And so does the whole set, of a part.
    bring(even, other := place("other"))
    assert bring(target_root, other).complete
    assert held(other) == contents(target_root)


def test_some_views_and_then_the_others(target_root, place):
    result = bring(target_root, out := place("set"), views=1)
    assert not result.complete
    assert "and holds 1 of 2 views" in result.summary()
    assert "not complete" not in result.summary()
    assert TargetSet(out).views == 1
    assert not verify(out, Silent()).problems
    assert bring(target_root, out, views=2).complete
    assert held(out) == contents(target_root)


@pytest.mark.parametrize("name", [MARKS, "latents", "shards/tars", "images/000001.tar"])
def test_nothing_is_written_or_removed_through_links(target_root, tmp_path, name):
    """The last of them is replaced by a file; the others are refused."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    bring(target_root, out := tmp_path / "set")
    remove_any(out / name)
    (out / name).symlink_to(tmp_path / "mine" / ("file" if name.endswith(".tar") else ""))
    shutil.rmtree(out / "codec.zarr")
    if name.endswith(".tar"):
        assert bring(target_root, out).complete
        assert held(out) == contents(target_root)
    else:
        with pytest.raises(BadInputError, match="symbolic link"):
            bring(target_root, out)
    assert contents(tmp_path / "mine") == {"file": b"x"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_disk_that_cannot_be_written(target_root, monkeypatch):
    monkeypatch.setattr(stage, "free_bytes", lambda path: None)
    with pytest.raises(BadInputError, match="cannot be written"):
        bring(target_root, Path("/proc/nowhere/set"))


def test_one_process_writes_at_a_time(target_root, tmp_path):
    with writing(tmp_path / "set"), pytest.raises(LockedError):
        bring(target_root, tmp_path / "set")


def test_disks_without_room(target_root, tmp_path, monkeypatch):
    with limited(resource.RLIMIT_FSIZE, 20_000), pytest.raises(OSError, match="too large"):
        bring(target_root, tmp_path / "set", workers=2)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]
    with monkeypatch.context() as patch:
        patch.setattr(stage, "free_bytes", lambda path: 1000)
        with pytest.raises(BadInputError, match="and 1 kB are free"):
            bring(target_root, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert bring(target_root, tmp_path / "set").complete
    monkeypatch.setattr(stage, "free_bytes", lambda path: 0)
    assert bring(target_root, tmp_path / "set").brought == 0


def test_the_command(target_root, tmp_path):
    out = tmp_path / "set"
    first = CliRunner().invoke(app, ["copy", str(target_root), str(out)])
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith(f"{out}: ")
    assert first.stdout.endswith("and is complete\n")
    # A log has bytes, their rate and the time left.
    assert "copy: copying" in first.stderr
    (out / LOST[0]).unlink()
    again = CliRunner().invoke(app, ["copy", str(target_root), out.as_uri(), "--workers", "2"])
    assert "1 file copied" in again.stdout
    damaged = put(target_root, tmp_path / "damaged")
    (damaged / LOST[0]).unlink()
    for words, code, said in (
        ([str(damaged), str(tmp_path / "other")], 2, f"verify {damaged}"),
        ([str(target_root), str(tmp_path / "damaged" / "images")], 2, "not empty"),
        ([str(target_root), ""], 2, "name is empty"),
        ([str(target_root), str(out), "--workers", "0"], 2, "--workers"),
    ):
        result = CliRunner().invoke(app, ["copy", *words])
        assert result.exit_code == code, result.output
        assert said in " ".join(result.output.replace("│", "").split())
    assert cae2pipe.copy(target_root, out, progress=False).path == out


def test_progress_is_in_bytes(tmp_path):
    clock = iter(range(100))
    with (tmp_path / "log").open("w+") as file:
        lines = Lines("copy", file, lambda: float(next(clock)), interval=1)
        lines.total(3_000_000_000, "bytes", done=1_000_000_000)
        lines.advance(500_000_000)
        file.seek(0)
        line = file.read()
    assert "1.5 GB/3 GB" in line
    assert "MB/s" in line
    assert "left" in line
