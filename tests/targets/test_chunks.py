"""Chunk and shard bytes: round trips, damage, and equality with zarr's own output."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from cae2pipe.targets.chunks import (
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
    st.sampled_from(["shuffle", "bitshuffle"]),
    st.booleans(),
    st.integers(0, 100),
)
def test_chunks_round_trip(shape, dtype, level, shuffle, one_block, seed):
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    data = encode_chunk(array, level, shuffle, one_block=one_block)
    assert np.array_equal(decode_chunk(data, shape, dtype, level=level), array)


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
    with pytest.raises(ChunkError, match="never written"):
        decode_index(encode_index([(2**64 - 1, 2**64 - 1)]), 1)


@pytest.mark.parametrize(
    ("level", "shuffle", "one_block"),
    [(0, "shuffle", False), (1, "shuffle", False), (1, "bitshuffle", False), (1, "bitshuffle", True)],
)
def test_shard_files_are_byte_for_byte_what_zarr_writes(tmp_path, level, shuffle, one_block):
    # More than Blosc would compress in one piece.
    values = np.random.default_rng(0).integers(0, 12, (6, 150, 107)).astype("<u2")
    group = zarr.create_group(tmp_path / "store.zarr", zarr_format=3)
    compressors = [Crc32cCodec()]
    size = 6 * 64 * 107 * 2 if one_block else 0
    if level:
        compressors.insert(0, BloscCodec(cname="zstd", clevel=level, shuffle=shuffle, blocksize=size))
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
    file = ShardFile(ours)
    for start in range(0, 150, 64):
        chunk = np.zeros((6, 64, 107), "<u2")
        part = values[:, start : start + 64]
        chunk[:, : part.shape[1]] = part
        file.append(encode_chunk(chunk, level, shuffle, one_block=one_block))
    file.close()
    assert ours.read_bytes() == (tmp_path / "store.zarr/theirs/c/0/0/0").read_bytes()
    assert np.array_equal(zarr.open_group(tmp_path / "store.zarr", mode="r")["ours"][...], values)
