"""Interrupted, grown or damaged shard sets: resumed to the same bytes, or refused."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cae2pipe.artifacts.artifact import check_files, open_artifact
from cae2pipe.errors import DamageError, MismatchError, Terminated
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards import checking
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.checking import Checked, FileSlice
from cae2pipe.shards.keys import sample_key
from cae2pipe.stages.verify import verify
from tests.conftest import contents, snapshot
from tests.shards.small_source import Stop, chosen, encoded, samples


@pytest.mark.parametrize("damage", ["deleted", "cut"])
@pytest.mark.parametrize("name", ["tars/000001.tar", "tars/000001.json", "rejects.jsonl", "listing-000.jsonl.gz"])
def test_only_what_is_missing_is_made_again(source, tmp_path, name, damage):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), report=Silent())
    before = snapshot(out)
    path = out / name
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    build_shard_set(source, out, chosen(), report=Silent())
    after = snapshot(out)
    remade = {name, name.replace(".tar", ".json")} if name.endswith((".tar", ".json")) else {name}
    remade |= {name.replace(".json", ".tar")} if name.endswith(".json") else set()
    assert {name for name in before if before[name] != after[name]} == remade
    assert after[name][0] == before[name][0]
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), Terminated(), RuntimeError("boom")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("after", [0, 8, 20])
def test_a_run_that_was_broken_off_goes_on(source, tmp_path, error, after):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build_shard_set(source, whole, chosen(), report=Silent())
    with pytest.raises(type(error)):
        build_shard_set(source, broken, chosen(), report=Stop(after, error))
    finished = {name for name in contents(broken) if name.startswith("tars/")}
    assert finished == {f"tars/{n:06d}.{kind}" for n in range(after // 8) for kind in ("tar", "json")}
    assert all(contents(whole)[name] == contents(broken)[name] for name in finished)
    times = {name: snapshot(broken)[name][1] for name in finished}
    build_shard_set(source, broken, chosen(), report=Silent())
    assert contents(broken) == contents(whole)
    assert {name: snapshot(broken)[name][1] for name in finished} == times


def test_a_run_broken_off_inside_a_tar_leaves_whole_tars_only(source, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build_shard_set(source, whole, chosen(), report=Silent())
    reads = iter(range(100))

    def check_image(piece: FileSlice) -> Checked:
        if next(reads) == 12:
            raise Terminated
        return real_check(piece)

    real_check = checking.check_image
    with monkeypatch.context() as patch:
        patch.setattr(checking, "check_image", check_image)
        with pytest.raises(Terminated):
            build_shard_set(source, broken, chosen(), report=Silent())
    assert sorted(path.name for path in (broken / "tars").iterdir()) == ["000000.json", "000000.tar"]
    build_shard_set(source, broken, chosen(), report=Silent())
    assert contents(broken) == contents(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.shards import build, checking

def check_image(piece, reads=iter(range(100)), real=checking.check_image):
    if next(reads) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(piece)

checking.check_image = check_image
settings = ShardSettings(samples=8, speed=ShardSpeed(workers=0))
from cae2pipe.runtime.progress import Silent
build.build_shard_set(Path(sys.argv[1]), Path(sys.argv[2]), settings, report=Silent())
"""


def test_a_killed_run_goes_on_and_its_debris_is_removed(source, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build_shard_set(source, whole, chosen(), report=Silent())
    result = subprocess.run([sys.executable, "-c", KILLED, str(source), str(killed)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (killed / ".tmp-tars+000001.tar" / "tars" / "000001.tar").exists()
    assert (killed / "tars" / "000000.tar").read_bytes() == (whole / "tars" / "000000.tar").read_bytes()
    build_shard_set(source, killed, chosen(), report=Silent())
    assert contents(killed) == contents(whole)


def test_new_images_go_into_tars_of_their_own(source, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    build_shard_set(source, out, chosen(), report=Silent())
    before = snapshot(out)
    for number in range(11):
        (source / f"dog/more{number}.jpg").write_bytes(encoded("JPEG", 50 + number))
    (source / "cat/broken.jpg").write_bytes(b"text")
    report = Silent()
    grown = build_shard_set(source, out, chosen(), report=report)
    assert any("12 new images of 39" in line for line in report.lines)
    assert grown.images == 24 + 11
    assert {"dog+more0", "dog+more10", "dog+01"} <= samples(grown).keys()
    assert [shard.name for shard in grown.shards] == [f"{n:06d}" for n in range(6)]
    after = snapshot(out)
    assert all(after[name] == before[name] for name in before if name.startswith(("tars/", "listing")))
    assert open_artifact(out).facts["rejected"] == 4
    assert verify(out, Silent()).problems == []
    build_shard_set(source, out, chosen(), report=report)
    assert report.lines[-1].startswith("nothing to do")
    assert snapshot(out) == after
    # A lost tar of either generation is restored; a set made in one run is a different set.
    for name in ("000000", "000005"):
        (out / f"tars/{name}.tar").unlink()
    (out / "listing-000.jsonl.gz").unlink()
    build_shard_set(source, out, chosen(), report=Silent())
    assert contents(out) == {name: data for name, (data, _) in after.items()}
    assert contents(build_shard_set(source, again, chosen(), report=Silent()).root).keys() != contents(out).keys()


def test_a_set_that_was_broken_off_may_grow(source, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build_shard_set(source, whole, chosen(), report=Silent())
    with pytest.raises(KeyboardInterrupt):
        build_shard_set(source, broken, chosen(), report=Stop(9, KeyboardInterrupt()))
    (source / "cat/more.jpg").write_bytes(encoded("JPEG", 50))
    for out in (whole, broken):
        build_shard_set(source, out, chosen(), report=Silent())
    assert contents(whole) == contents(broken)


def test_a_lost_listing_is_not_guessed(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), report=Silent())
    (out / "listing-000.jsonl.gz").unlink()
    (source / "cat/more.jpg").write_bytes(encoded("JPEG", 50))
    with pytest.raises(DamageError, match="the source has changed"):
        build_shard_set(source, out, chosen(), report=Silent())


@pytest.mark.parametrize("samples_", [1, 8])
def test_a_lost_tar_whose_images_no_longer_decode_is_not_replaced_by_less(source, tmp_path, samples_):
    out = tmp_path / "out"
    settings = chosen(samples=samples_)
    shards = build_shard_set(source, out, settings, report=Silent())
    key = shards.index(shards.shards[1])[0].key
    (path,) = (p for p in source.rglob("*.*") if sample_key(p.relative_to(source).as_posix().rpartition(".")[0]) == key)
    path.write_bytes(b"x" * path.stat().st_size)
    shards.shards[1].path.unlink()
    before = snapshot(out)
    with pytest.raises(MismatchError, match="have changed since"):
        build_shard_set(source, out, settings, report=Silent())
    assert snapshot(out) == before


def test_a_set_is_not_complete_from_the_moment_new_images_are_listed(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), report=Silent())
    (source / "cat/more.jpg").write_bytes(encoded("JPEG", 50))
    with pytest.raises(KeyboardInterrupt):
        build_shard_set(source, out, chosen(), report=Stop(0, KeyboardInterrupt()))
    artifact = open_artifact(out)
    assert "listing-001" in artifact.units
    assert not artifact.complete


def test_a_tar_is_made_again_only_as_it_was(source, tmp_path):
    out = tmp_path / "out"
    shards = build_shard_set(source, out, chosen(), report=Silent())
    key = shards.index(shards.shards[1])[0].key
    (path,) = (p for p in source.rglob("*.*") if sample_key(p.relative_to(source).as_posix().rpartition(".")[0]) == key)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"!")  # still decodes: only the end marker has changed
    (out / "tars/000001.tar").unlink()
    before = snapshot(out)
    with pytest.raises(MismatchError, match="have changed since"):
        build_shard_set(source, out, chosen(), report=Silent())
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["tars/000001.tar", "tars/000001.json", "rejects.jsonl", "listing-000.jsonl.gz"])
@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_damage_is_found_by_the_manifest(source, tmp_path, name, damage):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), report=Silent())
    assert check_files(open_artifact(out)) == []
    path, data = out / name, bytearray((out / name).read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (problem,) = check_files(open_artifact(out))
    assert problem.where == str(path)
    (problem,) = verify(out, Silent()).problems
    assert "--repair" in problem.fix
