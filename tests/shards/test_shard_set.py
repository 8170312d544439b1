"""Reading of shard sets: by ranges, from any process, and never silently wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import DamageError, ManifestError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards import shard_set
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.shards.tar import index_tar
from tests.conftest import write_photos


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    """Ten images in three shards of four, four and two."""
    write_photos(tmp_path / "photos", classes=2, each=5)
    return build_shard_set(
        tmp_path / "photos", tmp_path / "out", ShardSettings(samples=4, speed=ShardSpeed(workers=0)), report=Silent()
    )


def test_what_a_set_says_of_itself(shards):
    again = ShardSet.open(shards.root)
    assert again == shards
    assert again.classes == ["class0", "class1"]
    assert [(shard.name, shard.samples) for shard in again.shards] == [("000000", 4), ("000001", 4), ("000002", 2)]
    assert again.images == 10
    files = {name: entry for unit in open_artifact(shards.root).units.values() for name, entry in unit["files"].items()}
    for shard in again.shards:
        name = shard.path.relative_to(shards.root).as_posix()
        assert shard.sha256 == files[name]["sha256"]
        assert shard.index_sha256 == files[name.replace(".tar", ".json")]["sha256"]


def test_a_range_is_that_part_of_the_whole(shards):
    shard = shards.shards[0]
    whole = shards.read(shard, 0, 4)
    assert len(whole) == 4
    for low in range(5):
        for high in range(low, 6):
            assert shards.read(shard, low, high) == whole[low:high]


def test_originals_come_back_with_key_and_label(shards, tmp_path):
    for shard in shards.shards:
        for sample in shards.read(shard, 0, shard.samples):
            name, _, number = sample.key.partition("+")
            assert sample.data == (tmp_path / "photos" / name / f"{number}.jpg").read_bytes()
            assert shards.classes[sample.label] == name


def test_a_range_is_read_at_once(shards, monkeypatch):
    reads = []

    def read_tar_range(path: Path, offset: int, size: int) -> bytes:
        reads.append(size)
        return path.read_bytes()[offset : offset + size]

    shards.index(shards.shards[0])
    monkeypatch.setattr(shard_set, "read_tar_range", read_tar_range)
    samples = shards.read(shards.shards[0], 1, 4)
    assert len(reads) == 1
    assert reads[0] < sum(len(sample.data) for sample in samples) + 3 * 2048


def test_a_set_can_be_sent_to_another_process(shards):
    shards.index(shards.shards[0])
    again = pickle.loads(pickle.dumps(shards))
    assert again == shards
    assert again.read(again.shards[1], 0, 4) == shards.read(shards.shards[1], 0, 4)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ManifestError, match="no such folder"):
        ShardSet.open(tmp_path / "none")
    with pytest.raises(ManifestError, match=r"no manifest\.json") as caught:
        ShardSet.open(tmp_path)
    assert "cae2pipe shard" in caught.value.fix


@pytest.fixture
def damaged(shards):
    """The set and its second tar; this process has not read any of it."""
    shard_set._index.cache_clear()
    return shards, shards.shards[1]


def assert_damage(shards, shard, where):
    shard_set._index.cache_clear()
    with pytest.raises(DamageError) as caught:
        shards.read(shard, 0, 4)
    assert caught.value.where.startswith(str(where))
    assert "--repair" in caught.value.fix


def test_a_deleted_tar(damaged):
    shards, shard = damaged
    shard.path.unlink()
    assert_damage(shards, shard, shard.path)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_tar(damaged, share):
    shards, shard = damaged
    data = shard.path.read_bytes()
    shard.path.write_bytes(data[: int(len(data.rstrip(b"\0")) * share)])
    assert_damage(shards, shard, shard.path)


def test_a_changed_byte_of_an_image(damaged):
    shards, shard = damaged
    data = bytearray(shard.path.read_bytes())
    sample = shards.index(shard)[2]
    data[sample.offset + 30] ^= 1
    shard.path.write_bytes(data)
    assert_damage(shards, shard, f"{shard.path}, key {sample.key}")
    shards.read(shard, 0, 2)  # its neighbours can be read


def test_a_tar_of_another_shard(damaged):
    shards, shard = damaged
    shard.path.write_bytes(shards.shards[2].path.read_bytes())
    assert_damage(shards, shard, shard.path)


@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_a_damaged_index(damaged, damage):
    shards, shard = damaged
    path = shard.path.with_suffix(".json")
    data = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    else:
        data[10] ^= 1
        path.write_bytes(data[:-1] if damage == "cut" else data)
    assert_damage(shards, shard, path)


def test_the_index_says_what_the_tar_s_headers_say(shards):
    for shard in shards.shards:
        rows = [(s.key, s.label, s.offset, s.size) for s in index_tar(shard.path)]
        assert [row[:4] for row in shards.index(shard)] == rows
