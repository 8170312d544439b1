"""Folders to shard sets: every image once, deterministic bytes, other folders refused."""

from __future__ import annotations

import json
import os

import pytest

from cae2pipe.artifacts.artifact import ShardsArtifact
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.extract import ShardSettings
from cae2pipe.errors import LockedError, ManifestError, MismatchError, SourceError
from cae2pipe.runtime.keyed import keyed_permutation
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.verify import verify
from tests.conftest import contents, snapshot
from tests.shards.small_source import REJECTED, chosen, encoded, samples


def test_every_image_is_kept_untouched_under_its_label(source, tmp_path):
    shards = build_shard_set(source, tmp_path / "out", chosen(), report=Silent())
    kept = samples(shards)
    paths = [path for path in source.rglob("*.*") if path.relative_to(source).as_posix() not in REJECTED]
    assert sorted(data for _, data in kept.values()) == sorted(path.read_bytes() for path in paths)
    assert shards.classes == ["cat", "dog", "elk"]
    assert kept["elk+deep+palette"] == (2, (source / "elk/deep/palette.gif").read_bytes())
    assert kept["cat+png~20inside"][0] == 0
    assert kept["dog+v1~2e2~20~c3~bcn~c3~afcode"][0] == 1


def test_what_cannot_be_decoded_is_listed_and_counted(source, tmp_path):
    report = Silent()
    shards = build_shard_set(source, tmp_path / "out", chosen(), report=report)
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [reject["path"] for reject in rejects] == REJECTED
    assert all("cannot be decoded" in reject["reason"] for reject in rejects)
    artifact = ShardsArtifact.open(tmp_path / "out")
    assert artifact.facts["rejected"] == 3
    assert artifact.complete
    assert shards.images == 24
    assert "24 images" in report.lines[-1]
    assert "3 could not be decoded" in report.lines[-1]


def test_the_order_is_one_permutation_of_the_scan(source, tmp_path):
    shards = build_shard_set(source, tmp_path / "out", chosen(), report=Silent())
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for number, shard in enumerate(shards.shards):
        run = [files[index] for index in keyed_permutation(27, "shard", 0)[number * 8 : number * 8 + 8]]
        kept = [(source / path).read_bytes() for path in run if path not in REJECTED]
        assert [sample.data for sample in shards.read(shard, 0, 8)] == kept
    assert sum(shard.samples for shard in shards.shards) == 24


def test_workers_change_no_byte(source, tmp_path):
    build_shard_set(source, tmp_path / "alone", chosen(0), report=Silent())
    build_shard_set(source, tmp_path / "together", chosen(2), report=Silent())
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_the_seed_changes_the_order_and_not_the_images(source, tmp_path):
    first = build_shard_set(source, tmp_path / "a", chosen(), report=Silent())
    second = build_shard_set(source, tmp_path / "b", chosen(seed=1), report=Silent())
    assert samples(first) == samples(second)
    assert list(samples(first)) != list(samples(second))


def test_nothing_of_this_machine_is_written(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), report=Silent())
    moved = tmp_path / "elsewhere" / "images"
    moved.parent.mkdir()
    source.rename(moved)
    for path in moved.rglob("*.jpg"):
        os.utime(path, (1, 1))
    build_shard_set(moved, tmp_path / "again", chosen(), report=Silent())
    assert contents(tmp_path / "again") == contents(out)
    assert not any(str(tmp_path).encode() in data for data in contents(out).values())


def test_a_second_run_does_nothing_and_says_so(source, tmp_path):
    build_shard_set(source, tmp_path / "out", chosen(), report=Silent())
    before = snapshot(tmp_path / "out")
    report = Silent()
    build_shard_set(source, tmp_path / "out", chosen(), report=report)
    assert snapshot(tmp_path / "out") == before
    assert report.lines[0].startswith("nothing to do")
    assert "24 images" in report.lines[0]


def test_other_settings_and_another_source_are_refused_by_name(source, tmp_path):
    out = tmp_path / "out"
    build_shard_set(source, out, chosen(), report=Silent())
    before = snapshot(out)

    def refused(settings: ShardSettings = chosen()) -> str:  # noqa: B008 - settings do not change
        with pytest.raises(MismatchError) as caught:
            build_shard_set(source, out, settings, report=Silent())
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


def test_a_run_of_rejects_alone_makes_no_tar(source, tmp_path):
    out = tmp_path / "out"
    shards = build_shard_set(source, out, chosen(samples=1), report=Silent())
    assert len(shards.shards) == shards.images == 24
    assert len(list((out / "tars").glob("*.tar"))) == 24
    assert verify(out, Silent()).problems == []
    report = Silent()
    build_shard_set(source, out, chosen(samples=1), report=report)
    assert report.lines[0].startswith("nothing to do")


def test_a_source_without_one_good_image_is_refused_every_time(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_text("text")
    for _ in range(2):
        with pytest.raises(SourceError, match="none of the 3 files can be decoded"):
            build_shard_set(source, tmp_path / "out", chosen(), report=Silent())
    assert len((tmp_path / "out/rejects.jsonl").read_text().splitlines()) == 3


def test_images_without_classes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(encoded("JPEG", number))
    shards = build_shard_set(source, tmp_path / "out", chosen(), report=Silent())
    assert shards.classes == []
    assert {label for label, _ in samples(shards).values()} == {-1}


def test_folders_that_cannot_be_the_output(source, tmp_path):
    for out in (source, source / "shards"):
        with pytest.raises(SourceError, match="inside the source"):
            build_shard_set(source, out, chosen(), report=Silent())
    assert not (source / "shards").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(ManifestError, match=r"thesis\.tex"):
        build_shard_set(source, foreign, chosen(), report=Silent())
    with writing(tmp_path / "locked"), pytest.raises(LockedError):
        build_shard_set(source, tmp_path / "locked", chosen(), report=Silent())
