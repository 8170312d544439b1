"""Chunk and shard bytes: round trips, damage, and equality with zarr's own output."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from cae2pipe.targets.chunks import (
    ABSENT,
    SHUFFLES,
    ChunkError,
    ShardFile,
    decode_chunk,
    decode_index,
    encode_chunk,
    encode_index,
    index_size,
)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["<u2", "|i1", "<f2", "|u1"]),
    st.sampled_from([0, 1, 5]),
    st.sampled_from(list(SHUFFLES)),
    st.integers(0, 100),
)
def test_chunks_round_trip(shape, dtype, level, shuffle, seed):
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    data = encode_chunk(array, level, shuffle)
    assert np.array_equal(decode_chunk(data, shape, dtype, level=level), array)
    if level:
        into = np.empty_like(array)
        assert decode_chunk(data, shape, dtype, level=level, out=into) is into
        assert np.array_equal(into, array)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([0, 1]))
def test_every_flipped_bit_and_every_cut_is_found(data, level):
    array = np.arange(600, dtype="<u2").reshape(10, 60) % 7
    good = encode_chunk(array, level)
    position = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ChunkError):
        decode_chunk(bytes(flipped), array.shape, "<u2", level=level)
    with pytest.raises(ChunkError):
        decode_chunk(good[:position], array.shape, "<u2", level=level)


def test_index_round_trips_and_damage_is_found():
    spans = [(0, 10), (10, 30), (40, 5)]
    data = encode_index(spans)
    assert len(data) == index_size(3)
    assert decode_index(data, 3).tolist() == [list(span) for span in spans]
    with pytest.raises(ChunkError, match="damaged"):
        decode_index(data[:-5] + b"x" + data[-4:], 3)
    absent = encode_index([(0, 10), (ABSENT, ABSENT)])
    with pytest.raises(ChunkError, match="never written"):
        decode_index(absent, 2)
    assert decode_index(absent, 2, absent=True).tolist() == [[0, 10], [0, 0]]
    with pytest.raises(ChunkError, match="never written"):
        decode_index(encode_index([(5, ABSENT)]), 1, absent=True)


@pytest.mark.parametrize(("level", "shuffle"), [(0, "shuffle"), *((1, shuffle) for shuffle in SHUFFLES)])
def test_shard_files_are_byte_for_byte_what_zarr_writes(tmp_path, level, shuffle):
    # More than Blosc compresses in one piece by default.
    values = np.random.default_rng(0).integers(0, 12, (6, 150, 107)).astype("<u2")
    group = zarr.create_group(tmp_path / "store.zarr", zarr_format=3)
    compressors = [Crc32cCodec()]
    if level:
        compressors.insert(0, BloscCodec(cname="zstd", clevel=level, shuffle=shuffle, blocksize=6 * 64 * 107 * 2))
    options = {
        "shape": values.shape,
        "chunks": (6, 64, 107),
        "shards": (6, 192, 107),
        "dtype": "<u2",
        "compressors": compressors,
        "filters": None,
        "fill_value": 0,
    }
    group.create_array("theirs", **options)[...] = values
    group.create_array("ours", **options)
    ours = tmp_path / "store.zarr/ours/c/0/0/0"
    file = ShardFile(ours, (1, None, 1))
    for start in range(0, 150, 64):
        chunk = np.zeros((6, 64, 107), "<u2")
        part = values[:, start : start + 64]
        chunk[:, : part.shape[1]] = part
        file.append([encode_chunk(chunk, level, shuffle)])
    file.close()
    assert ours.read_bytes() == (tmp_path / "store.zarr/theirs/c/0/0/0").read_bytes()
    assert np.array_equal(zarr.open_group(tmp_path / "store.zarr", mode="r")["ours"][...], values)


def test_zarr_reads_shards_of_several_chunks_per_block_and_absent_ones(tmp_path):
    values = np.random.default_rng(0).integers(1, 12, (2, 6, 150, 5)).astype("|u1")
    values[1, 2:] = 0
    values[0, 4:, 64:128] = 0
    group = zarr.create_group(tmp_path / "store.zarr", zarr_format=3)
    group.create_array(
        "ours",
        shape=values.shape,
        chunks=(1, 2, 64, 5),
        shards=(2, 6, 192, 5),
        dtype="|u1",
        compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle"), Crc32cCodec()],
        filters=None,
        fill_value=0,
    )
    path = tmp_path / "store.zarr/ours/c/0/0/0/0"
    file = ShardFile(path, (2, 3, None, 1))
    padded = np.concatenate([values, np.zeros((2, 6, 42, 5), "|u1")], axis=2)
    written = 0
    for start in range(0, 150, 64):
        parts = [padded[p : p + 1, c : c + 2, start : start + 64] for p in (0, 1) for c in (0, 2, 4)]
        file.append([encode_chunk(part, 1, "noshuffle") if part.any() else b"" for part in parts])
        written += sum(bool(part.any()) for part in parts)
    file.close()
    assert written < 18
    assert np.array_equal(zarr.open_group(tmp_path / "store.zarr", mode="r")["ours"][...], values)
    # The block's chunks are adjacent, in whatever order the index lists them.
    spans = decode_index(path.read_bytes()[-index_size(18) :], 18, absent=True).reshape(6, 3, 2)
    for block in range(3):
        own = sorted(span for span in spans[:, block].tolist() if span[1])
        assert all(low + size == after for (low, size), (after, _) in itertools.pairwise(own))
