"""Blocks kept per shard, and what workers are sent: the same as the manifest's, in a few bytes per shard or store."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.artifacts.storage import file_sizes, put_bytes, to_path
from cae2pipe.errors import ManifestError
from cae2pipe.loading.loader import block_refs
from cae2pipe.loading.order import BlockList, BlockRef, stream_pieces
from cae2pipe.loading.store_units import METADATA, StoreUnits
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.target_set import TargetSet

shards_strategy = st.lists(
    st.tuples(
        st.integers(1, 400) | st.sampled_from([63, 64, 65, 128]),
        st.sets(st.integers(0, 4), min_size=1).map(sorted).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(shards_strategy, st.integers(0, 3), st.integers(0, 9), st.integers(1, 12), st.data())
def test_a_block_list_is_the_list_of_its_blocks(shards, seed, epoch, streams, data):
    names = [f"{number:06d}" for number in range(len(shards))]
    pairs = dict(zip(names, shards, strict=True))
    blocks = BlockList({n: samples for n, (samples, _) in pairs.items()}, {n: views for n, (_, views) in pairs.items()})
    plain = [
        BlockRef(name, block, min(BLOCK, samples - block * BLOCK), views)
        for name, (samples, views) in pairs.items()
        for block in range(-(-samples // BLOCK))
    ]
    chosen = data.draw(st.none() | st.sets(st.integers(0, len(plain) - 1), min_size=1).map(sorted))
    if chosen is not None:
        blocks, plain = blocks.take(chosen), [plain[index] for index in chosen]
    blocks = pickle.loads(pickle.dumps(blocks))
    assert list(blocks) == plain
    assert blocks[-1] == plain[-1]
    assert blocks[1:3] == plain[1:3]
    assert blocks.sizes().tolist() == [block.samples for block in plain]
    assert blocks.total == sum(block.samples for block in plain)
    own, theirs = (stream_pieces(each, seed, epoch, streams=streams, wanted=range(streams)) for each in (blocks, plain))
    assert {stream: list(own[stream]) for stream in own} == {stream: list(theirs[stream]) for stream in theirs}


def test_a_process_permutes_once_an_epoch_and_sends_none_of_it():
    blocks = BlockList({"000000": 6400}, {"000000": (0, 1)})
    size = len(pickle.dumps(blocks))
    first = blocks.permuted(0, 0)
    assert blocks.permuted(0, 0) is first
    for epoch in range(1, 4):
        blocks.permuted(0, epoch)
    assert blocks.permuted(0, 0) is not first
    assert np.array_equal(blocks.permuted(0, 0)[0], first[0])
    assert len(pickle.dumps(blocks)) == size
    with pytest.raises(IndexError, match="block 100 of 100"):
        blocks[100]


def test_views_of_a_shard_with_different_samples_are_refused(target_root):
    targets = TargetSet(target_root)
    targets.stores.samples["v01/000000"] += 1
    with pytest.raises(ManifestError, match="shard 000000 have 71 and 70 samples"):
        block_refs(targets)


@pytest.mark.parametrize("kind", ["target_root", "stored_root"])
def test_workers_get_what_readers_need_of_the_manifest(kind, request):
    root = request.getfixturevalue(kind)
    remote = to_path(f"memory://units/{kind}")
    for name in file_sizes(root):
        put_bytes(remote / name, (root / name).read_bytes())
    for where in (root, remote):
        targets = TargetSet(where)
        units = pickle.loads(pickle.dumps(StoreUnits(targets, list(targets.stores))))
        assert list(units) == sorted(targets.stores)
        for name, unit in units.items():
            entry = targets.stores[name]
            assert (unit["tar"], unit["zarr"], unit["samples"]) == (entry["tar"], entry["zarr"], entry["samples"])
            read = {path: each for path, each in entry["files"].items() if not path.endswith((METADATA, ".json"))}
            assert unit["files"] == (read if where is remote else {})
        with pytest.raises(KeyError):
            units["v09/000000"]
    local = StoreUnits(TargetSet(root), ["v00/000000"])
    assert list(local) == ["v00/000000"]
