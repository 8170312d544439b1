"""The bytes of Zarr v3 chunks and shards, written and read without zarr-python.

A target store's big arrays have one shard file each. zarr-python assembles such a file in memory and reads a chunk
through several layers. A store is written block by block, as the teacher yields them, and read one chunk at a time, so
both directions work on the file itself. The files are valid Zarr v3 (tested: byte-identical to zarr's own).

Shard file: the chunks, then the index (offset and length of each chunk, uint64 little-endian), then CRC-32C of the
index. Chunk: array bytes, through Blosc (zstd) where the array is compressed, then CRC-32C. Blosc alone silently
returns wrong data after a flipped bit; the checksum turns damage into an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
from numcodecs import blosc

BLOCK = 64
"""Samples per block: the unit of I/O, of shuffling and of resuming."""


RESIDUE = 0x48674BC7
"""CRC-32C of any bytes followed by their CRC-32C in little-endian order."""


Shuffle = Literal["shuffle", "bitshuffle"]


class ChunkError(ValueError):
    """A chunk's or an index's bytes are damaged. The store adds location and fix."""


SHUFFLES: dict[Shuffle, int] = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
"""What Blosc does before it compresses, by the names that zarr gives it."""


def encode_chunk(array: np.ndarray, level: int, shuffle: Shuffle = "bitshuffle", *, one_block: bool = False) -> bytes:
    """An array's bytes with their checksum, compressed unless ``level`` is 0; ``shuffle`` is one of ``SHUFFLES``.

    ``one_block``: compress in one piece, instead of in pieces of the size that Blosc chooses for the level.
    """
    array = np.ascontiguousarray(array)
    if level == 0:
        data = array.tobytes()
    else:
        size = array.nbytes if one_block else blosc.AUTOBLOCKS
        data = blosc.compress(array, b"zstd", level, shuffle=SHUFFLES[shuffle], blocksize=size)
    return data + _checksum(data)


def decode_chunk(data: bytes, shape: tuple[int, ...], dtype: str, *, level: int) -> np.ndarray:
    """Inverse of ``encode_chunk``; read-only where the bytes are used in place.

    Raises:
        ChunkError: the checksum or the size is wrong.
    """
    if not is_sound(data):
        raise ChunkError("the chunk's checksum does not match its bytes")
    body = memoryview(data)[:-4]
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if level:
        if len(body) < 16 or int.from_bytes(body[4:8], "little") != size:
            raise ChunkError("the chunk does not decompress to its array's size")
        array = np.empty(shape, dtype=dtype)
        blosc.decompress(body, array)
        return array
    if len(body) != size:
        raise ChunkError(f"the chunk holds {len(body)} bytes instead of {size}")
    return np.frombuffer(body, dtype=dtype).reshape(shape)


def _checksum(data: bytes) -> bytes:
    value: int = google_crc32c.value(data)
    return value.to_bytes(4, "little")


def is_sound(data: bytes) -> bool:
    """Whether bytes that end in their own CRC-32C match it.

    The CRC of any data followed by its own CRC is a constant, so no slice has to be copied.
    """
    return len(data) >= 4 and google_crc32c.value(data) == RESIDUE


def index_size(blocks: int) -> int:
    return 16 * blocks + 4


def encode_index(spans: list[tuple[int, int]]) -> bytes:
    """The shard index for chunks at (offset, length)."""
    data = np.array(spans, dtype="<u8").tobytes()
    return data + _checksum(data)


def decode_index(data: bytes, blocks: int) -> np.ndarray:
    """Offsets and lengths, int64 (blocks, 2), from the last ``index_size(blocks)`` bytes of a shard file."""
    if len(data) != index_size(blocks) or not is_sound(data):
        raise ChunkError("the shard's index is damaged or truncated")
    spans = np.frombuffer(data[:-4], dtype="<u8").reshape(blocks, 2)
    # zarr marks a chunk that was never written with the largest integer, and reads it as zeros. Here it is damage.
    if spans.size and spans.max() >= 2**63:
        raise ChunkError("the shard's index lists a chunk that was never written")
    return spans.astype(np.int64)


class ShardFile:
    """Writes one shard file, chunk by chunk. ``close`` writes the index."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._spans: list[tuple[int, int]] = []
        self._offset = 0

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._spans.append((self._offset, len(chunk)))
        self._offset += len(chunk)

    def abort(self) -> None:
        self._file.close()

    def close(self) -> None:
        self._file.write(encode_index(self._spans))
        self._file.close()
