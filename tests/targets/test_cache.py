"""The local cache of remote blocks: no repeated fetches, bounded size, never wrong data."""

from __future__ import annotations

import pickle

import pytest

from cae2pipe.artifacts import storage
from cae2pipe.artifacts.storage import file_sizes, put_bytes, to_path
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.cache import BlockCache, folder_bytes
from tests.conftest import contents


class Source:
    def __init__(self, data: bytes):
        self.data, self.fetched = data, 0

    def __call__(self) -> bytes:
        self.fetched += 1
        return self.data


def test_a_piece_is_fetched_once(tmp_path):
    cache, source = BlockCache(tmp_path, 10_000), Source(b"abc")
    assert [cache.read("d", 0, 3, fetch=source) for _ in range(3)] == [b"abc"] * 3
    assert source.fetched == 1
    again = pickle.loads(pickle.dumps(cache))
    assert again.read("d", 0, 3, fetch=source) == b"abc"
    assert source.fetched == 1


@pytest.mark.parametrize("other", [("e", 0, 3), ("d", 1, 3), ("d", 0, 4)])
def test_other_pieces_are_other_pieces(tmp_path, other):
    cache = BlockCache(tmp_path, 10_000)
    cache.read("d", 0, 3, fetch=Source(b"abc"))
    assert cache.read(*other, fetch=Source(b"xyz")) == b"xyz"


def test_the_bound_holds_and_what_is_there_stays(tmp_path):
    cache, source = BlockCache(tmp_path, 1000), Source(bytes(196))
    for number in range(20):
        cache.read("d", number, 196, fetch=source)
    assert folder_bytes(tmp_path) == 1000
    assert source.fetched == 20
    for number in range(20):
        cache.read("d", number, 196, fetch=source)
    assert source.fetched == 20 + 15
    other = BlockCache(tmp_path, 1000)  # another process finds it full
    other.read("e", 0, 196, fetch=source)
    assert folder_bytes(tmp_path) == 1000


@pytest.mark.parametrize("damage", [b"", b"abd0000", b"ab"])
def test_a_damaged_piece_is_fetched_again(tmp_path, damage):
    cache, source = BlockCache(tmp_path, 1000), Source(b"abc")
    cache.read("d", 0, 3, fetch=source)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(damage)
    assert cache.read("d", 0, 3, fetch=source) == b"abc"
    assert cache.read("d", 0, 3, fetch=source) == b"abc"
    assert source.fetched == 2


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache, source = BlockCache(tmp_path / "file", 1000), Source(b"abc")
    assert cache.read("d", 0, 3, fetch=source) == cache.read("d", 0, 3, fetch=source) == b"abc"
    assert source.fetched == 2


def test_training_from_a_remote_set_reads_each_block_once(target_root, tmp_path, pretrain_settings, monkeypatch):
    remote = to_path("memory://cached/set")
    for name in file_sizes(target_root):
        put_bytes(remote / name, (target_root / name).read_bytes())
    read, fetched = storage.read_range, []

    def counted(path, offset, size):
        fetched.append((str(path), offset, size))
        return read(path, offset, size)

    monkeypatch.setattr("cae2pipe.targets.store.read_range", counted)
    settings = pretrain_settings(epochs=4, speed={"cache": str(tmp_path / "cache")})
    pretrain(remote, tmp_path / "run", settings, report=Silent())
    assert fetched
    assert len(fetched) == len(set(fetched))
    pretrain(target_root, tmp_path / "local", pretrain_settings(epochs=4), report=Silent())
    assert contents(tmp_path / "run")["encoder.safetensors"] == contents(tmp_path / "local")["encoder.safetensors"]
