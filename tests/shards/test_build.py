"""Folders to shard sets: every image once, bytes that depend on nothing else, and what was broken off goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cae2pipe.artifacts.box import ShardsBox, check_files, open_box
from cae2pipe.artifacts.lock import writing
from cae2pipe.cli import app
from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import DamageError, LockedError, ManifestError, MismatchError, SourceError, Terminated
from cae2pipe.inspection import verify
from cae2pipe.runtime.keyed import keyed_permutation
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards import checking
from cae2pipe.shards.build import build_all, build_shard_set
from cae2pipe.shards.checking import Checked, Piece
from cae2pipe.shards.keys import sample_key
from cae2pipe.shards.shard_set import ShardSet
from tests.conftest import contents, snapshot

REJECTED = ["cat/cut.jpg", "dog/text.jpg", "elk/empty.png"]
"""Files of ``source`` that cannot be decoded."""


def encoded(kind: str, seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path) -> Path:
    """27 files in three classes: 24 images of many kinds, and three that are none."""
    files = {f"{name}/{n:02d}.jpg": encoded("JPEG", n) for n, name in enumerate(["cat", "dog", "elk"] * 6)}
    files |= {
        "cat/png inside.JPEG": encoded("PNG", 20),
        "cat/cmyk.jpg": encoded("JPEG", 21, "CMYK"),
        "dog/grey.jpeg": encoded("JPEG", 22, "L"),
        "dog/v1.2 ünïcode.jpg": encoded("JPEG", 23),
        "elk/deep/palette.gif": encoded("GIF", 24),
        "elk/alpha.png": encoded("PNG", 25, "RGBA"),
        "cat/cut.jpg": encoded("JPEG", 26)[:-60],
        "dog/text.jpg": b"this is text",
        "elk/empty.png": b"",
    }
    for path, data in files.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(data)
    return tmp_path / "source"


def chosen(workers: int = 0, **settings) -> ShardSettings:
    return ShardSettings(**{"samples": 8, **settings}, speed=ShardSpeed(workers=workers))


def samples(shards: ShardSet) -> dict[str, tuple[int, bytes]]:
    read = [sample for shard in shards.shards for sample in shards.read(shard, 0, shard.samples)]
    assert len({sample.key for sample in read}) == len(read) == shards.images
    return {sample.key: (sample.label, sample.data) for sample in read}


class Stop(Silent):
    """Ends the run once ``after`` images are done, as ``error`` would."""

    def __init__(self, after: int, error: BaseException):
        super().__init__()
        self.left, self.error = after, error

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self.left -= n
        if self.left < 0:
            raise self.error


def test_every_image_is_kept_untouched_under_its_label(source, tmp_path):
    shards = build_shard_set(source, tmp_path / "out", chosen(), Silent())
    kept = samples(shards)
    paths = [path for path in source.rglob("*.*") if path.relative_to(source).as_posix() not in REJECTED]
    assert sorted(data for _, data in kept.values()) == sorted(path.read_bytes() for path in paths)
    assert shards.classes == ["cat", "dog", "elk"]
    assert kept["elk+deep+palette"] == (2, (source / "elk/deep/palette.gif").read_bytes())
    assert kept["cat+png~20inside"][0] == 0
    assert kept["dog+v1~2e2~20~c3~bcn~c3~afcode"][0] == 1


def test_what_cannot_be_decoded_is_listed_and_counted(source, tmp_path):
    report = Silent()
    shards = build_shard_set(source, tmp_path / "out", chosen(), report)
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [reject["path"] for reject in rejects] == REJECTED
    assert all("cannot be decoded" in reject["reason"] for reject in rejects)
    box = ShardsBox.open(tmp_path / "out")
    assert box.facts["rejected"] == 3
    assert box.complete
    assert shards.images == 24
    assert "24 images" in report.lines[-1]
    assert "3 could not be decoded" in report.lines[-1]


def test_the_order_is_one_permutation_of_the_scan(source, tmp_path):
    shards = build_shard_set(source, tmp_path / "out", chosen(), Silent())
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for number, shard in enumerate(shards.shards):
        run = [files[index] for index in keyed_permutation(27, "shard", 0)[number * 8 : number * 8 + 8]]
        kept = [(source / path).read_bytes() for path in run if path not in REJECTED]
        assert [sample.data for sample in shards.read(shard, 0, 8)] == kept
    assert sum(shard.samples for shard in shards.shards) == 24


def test_workers_change_no_byte(source, tmp_path):
    build_shard_set(source, tmp_path / "alone", chosen(0), Silent())
    build_shard_set(source, tmp_path / "together", chosen(2), Silent())
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_the_seed_changes_the_order_and_not_the_images(source, tmp_path):
    first = build_shard_set(source, tmp_path / "a", chosen(), Silent())
    second = build_shard_set(source, tmp_path / "b", chosen(seed=1), Silent())
    assert samples(first) == samples(second)
    assert list(samples(first)) != list(samples(second))


def test_nothing_of_this_machine_is_written(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), Silent())
    moved = tmp_path / "elsewhere" / "images"
    moved.parent.mkdir()
    source.rename(moved)
    for path in moved.rglob("*.jpg"):
        os.utime(path, (1, 1))
    build_shard_set(moved, tmp_path / "again", chosen(), Silent())
    assert contents(tmp_path / "again") == contents(out)
    assert not any(str(tmp_path).encode() in data for data in contents(out).values())


def test_a_second_run_does_nothing_and_says_so(source, tmp_path):
    build_shard_set(source, tmp_path / "out", chosen(), Silent())
    before = snapshot(tmp_path / "out")
    report = Silent()
    build_shard_set(source, tmp_path / "out", chosen(), report)
    assert snapshot(tmp_path / "out") == before
    assert report.lines[0].startswith("nothing to do")
    assert "24 images" in report.lines[0]


@pytest.mark.parametrize("damage", ["deleted", "cut"])
@pytest.mark.parametrize("name", ["tars/000001.tar", "tars/000001.json", "rejects.jsonl", "listing-000.jsonl.gz"])
def test_only_what_is_missing_is_made_again(source, tmp_path, name, damage):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), Silent())
    before = snapshot(out)
    path = out / name
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    build_shard_set(source, out, chosen(), Silent())
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
    build_shard_set(source, whole, chosen(), Silent())
    with pytest.raises(type(error)):
        build_shard_set(source, broken, chosen(), Stop(after, error))
    finished = {name for name in contents(broken) if name.startswith("tars/")}
    assert finished == {f"tars/{n:06d}.{kind}" for n in range(after // 8) for kind in ("tar", "json")}
    assert all(contents(whole)[name] == contents(broken)[name] for name in finished)
    times = {name: snapshot(broken)[name][1] for name in finished}
    build_shard_set(source, broken, chosen(), Silent())
    assert contents(broken) == contents(whole)
    assert {name: snapshot(broken)[name][1] for name in finished} == times


def test_a_run_broken_off_inside_a_tar_leaves_whole_tars_only(source, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build_shard_set(source, whole, chosen(), Silent())
    reads = iter(range(100))

    def check_image(piece: Piece) -> Checked:
        if next(reads) == 12:
            raise Terminated
        return real_check(piece)

    real_check = checking.check_image
    with monkeypatch.context() as patch:
        patch.setattr(checking, "check_image", check_image)
        with pytest.raises(Terminated):
            build_shard_set(source, broken, chosen(), Silent())
    assert sorted(path.name for path in (broken / "tars").iterdir()) == ["000000.json", "000000.tar"]
    build_shard_set(source, broken, chosen(), Silent())
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
build.build_shard_set(Path(sys.argv[1]), Path(sys.argv[2]), settings, Silent())
"""


def test_a_killed_run_goes_on_and_its_debris_is_removed(source, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build_shard_set(source, whole, chosen(), Silent())
    result = subprocess.run([sys.executable, "-c", KILLED, str(source), str(killed)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (killed / ".tmp-tars+000001.tar" / "tars" / "000001.tar").exists()
    assert (killed / "tars" / "000000.tar").read_bytes() == (whole / "tars" / "000000.tar").read_bytes()
    build_shard_set(source, killed, chosen(), Silent())
    assert contents(killed) == contents(whole)


def test_other_settings_and_another_source_are_refused_by_name(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), Silent())
    before = snapshot(out)

    def refused(settings: ShardSettings = chosen()) -> str:  # noqa: B008 - settings do not change
        with pytest.raises(MismatchError) as caught:
            build_shard_set(source, out, settings, Silent())
        assert "another output folder" in caught.value.fix
        return caught.value.what

    assert "settings.samples = 8, and 9" in refused(chosen(samples=9))
    assert "settings.seed = 0, and 1" in refused(chosen(seed=1))
    (source / "cat/00.jpg").rename(source / "cat/zero.jpg")
    assert "cat/00.jpg is no longer there" in refused()
    (source / "cat/zero.jpg").rename(source / "cat/00.jpg")
    (source / "cat/00.jpg").write_bytes((source / "cat/00.jpg").read_bytes() + b"!")
    assert "cat/00.jpg has" in refused()
    (source / "cat/00.jpg").write_bytes((source / "cat/00.jpg").read_bytes()[:-1])
    (source / "cat").rename(source / "lynx")
    assert "classes" in refused()
    assert snapshot(out) == before


def test_new_images_go_into_tars_of_their_own(source, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    build_shard_set(source, out, chosen(), Silent())
    before = snapshot(out)
    for number in range(11):
        (source / f"dog/more{number}.jpg").write_bytes(encoded("JPEG", 50 + number))
    (source / "cat/broken.jpg").write_bytes(b"text")
    report = Silent()
    grown = build_shard_set(source, out, chosen(), report)
    assert any("12 of 39 images" in line for line in report.lines)
    assert grown.images == 24 + 11
    assert {"dog+more0", "dog+more10", "dog+01"} <= samples(grown).keys()
    assert [shard.name for shard in grown.shards] == [f"{n:06d}" for n in range(6)]
    after = snapshot(out)
    assert all(after[name] == before[name] for name in before if name.startswith(("tars/", "listing")))
    assert open_box(out).facts["rejected"] == 4
    assert verify(out, Silent()).problems == []
    build_shard_set(source, out, chosen(), report)
    assert report.lines[-1].startswith("nothing to do")
    assert snapshot(out) == after
    # Whoever lost a tar of either generation has it back; a set made at one go is another set.
    for name in ("000000", "000005"):
        (out / f"tars/{name}.tar").unlink()
    (out / "listing-000.jsonl.gz").unlink()
    build_shard_set(source, out, chosen(), Silent())
    assert contents(out) == {name: data for name, (data, _) in after.items()}
    assert contents(build_shard_set(source, again, chosen(), Silent()).root).keys() != contents(out).keys()


def test_a_set_that_was_broken_off_may_grow(source, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build_shard_set(source, whole, chosen(), Silent())
    with pytest.raises(KeyboardInterrupt):
        build_shard_set(source, broken, chosen(), Stop(9, KeyboardInterrupt()))
    (source / "cat/more.jpg").write_bytes(encoded("JPEG", 50))
    for out in (whole, broken):
        build_shard_set(source, out, chosen(), Silent())
    assert contents(whole) == contents(broken)


def test_a_lost_listing_is_not_guessed(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), Silent())
    (out / "listing-000.jsonl.gz").unlink()
    (source / "cat/more.jpg").write_bytes(encoded("JPEG", 50))
    with pytest.raises(DamageError, match="no longer the same"):
        build_shard_set(source, out, chosen(), Silent())


@pytest.mark.parametrize("samples_", [1, 8])
def test_a_lost_tar_whose_images_no_longer_decode_is_not_replaced_by_less(source, tmp_path, samples_):
    out = tmp_path / "out"
    settings = chosen(samples=samples_)
    shards = build_shard_set(source, out, settings, Silent())
    key = shards.index(shards.shards[1])[0].key
    (path,) = (p for p in source.rglob("*.*") if sample_key(p.relative_to(source).as_posix().rpartition(".")[0]) == key)
    path.write_bytes(b"x" * path.stat().st_size)
    shards.shards[1].path.unlink()
    before = snapshot(out)
    with pytest.raises(MismatchError, match="no longer those"):
        build_shard_set(source, out, settings, Silent())
    assert snapshot(out) == before


def test_a_set_is_not_complete_from_the_moment_new_images_are_listed(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), Silent())
    (source / "cat/more.jpg").write_bytes(encoded("JPEG", 50))
    with pytest.raises(KeyboardInterrupt):
        build_shard_set(source, out, chosen(), Stop(0, KeyboardInterrupt()))
    box = open_box(out)
    assert "listing-001" in box.units
    assert not box.complete


def test_a_tar_is_made_again_only_as_it_was(source, tmp_path):
    out = tmp_path / "out"
    shards = build_shard_set(source, out, chosen(), Silent())
    key = shards.index(shards.shards[1])[0].key
    (path,) = (p for p in source.rglob("*.*") if sample_key(p.relative_to(source).as_posix().rpartition(".")[0]) == key)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"!")  # still decodes: only the end marker has changed
    (out / "tars/000001.tar").unlink()
    before = snapshot(out)
    with pytest.raises(MismatchError, match="no longer those"):
        build_shard_set(source, out, chosen(), Silent())
    assert snapshot(out) == before


def test_a_run_of_rejects_alone_makes_no_tar(source, tmp_path):
    out = tmp_path / "out"
    shards = build_shard_set(source, out, chosen(samples=1), Silent())
    assert len(shards.shards) == shards.images == 24
    assert len(list((out / "tars").glob("*.tar"))) == 24
    assert verify(out, Silent()).problems == []
    report = Silent()
    build_shard_set(source, out, chosen(samples=1), report)
    assert report.lines[0].startswith("nothing to do")


def test_a_source_without_one_good_image_is_refused_every_time(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_text("text")
    for _ in range(2):
        with pytest.raises(SourceError, match="none of the 3 files can be decoded"):
            build_shard_set(source, tmp_path / "out", chosen(), Silent())
    assert len((tmp_path / "out/rejects.jsonl").read_text().splitlines()) == 3


def test_images_without_classes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(encoded("JPEG", number))
    shards = build_shard_set(source, tmp_path / "out", chosen(), Silent())
    assert shards.classes == []
    assert {label for label, _ in samples(shards).values()} == {-1}


def test_folders_that_cannot_be_the_output(source, tmp_path):
    for out in (source, source / "shards"):
        with pytest.raises(SourceError, match="inside the source"):
            build_shard_set(source, out, chosen(), Silent())
    assert not (source / "shards").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(ManifestError, match=r"thesis\.tex"):
        build_shard_set(source, foreign, chosen(), Silent())
    with writing(tmp_path / "locked"), pytest.raises(LockedError):
        build_shard_set(source, tmp_path / "locked", chosen(), Silent())


@pytest.mark.parametrize("name", ["tars/000001.tar", "tars/000001.json", "rejects.jsonl", "listing-000.jsonl.gz"])
@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_damage_is_found_by_the_manifest(source, tmp_path, name, damage):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), Silent())
    assert check_files(open_box(out)) == []
    path, data = out / name, bytearray((out / name).read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (problem,) = check_files(open_box(out))
    assert problem.where == str(path)
    (problem,) = verify(out, Silent()).problems
    assert "--repair" in problem.fix


def test_splits_make_a_shard_set_each(source, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(source, root / "train")
    shutil.copytree(source / "cat", root / "val" / "cat")
    made = build_all(root, tmp_path / "out", chosen(), Silent())
    assert [(shards.root, shards.images) for shards in made] == [
        (tmp_path / "out/train", 24),
        (tmp_path / "out/val", 8),
    ]
    alone = build_shard_set(source, tmp_path / "alone", chosen(), Silent())
    assert contents(tmp_path / "out/train") == contents(alone.root)
    with pytest.raises(SourceError, match="splits train, val"):
        build_shard_set(root, tmp_path / "other", chosen(), Silent())


def test_all_splits_are_looked_at_before_the_first_is_packed(source, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(source, root / "train")
    (root / "val" / "cat").mkdir(parents=True)
    with pytest.raises(SourceError, match="empty"):
        build_all(root, tmp_path / "out", chosen(), Silent())
    assert not (tmp_path / "out").exists()


def test_the_command_line(source, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(source, root / "train")
    shutil.copytree(source / "cat", root / "test" / "cat")
    arguments = ["shard", str(root), str(tmp_path / "out"), "--workers", "0", "--set", "samples=8"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert ShardSet.open(tmp_path / "out" / "train").images == 24
    assert ShardSet.open(tmp_path / "out" / "test").images == 8
    for bad in (tmp_path / "nothing", source / "cat" / "00.jpg"):
        result = CliRunner().invoke(app, ["shard", str(bad), str(tmp_path / "bad")])
        assert result.exit_code == 2
        assert "fix:" in result.stderr
        assert not (tmp_path / "bad").exists()
