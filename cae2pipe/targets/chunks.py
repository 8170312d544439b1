"""The bytes of Zarr v3 chunks and shards, written and read without zarr-python.

A target store's big arrays have one shard file each. zarr-python assembles such a file in memory and reads a chunk
through several layers. A store is written block by block, as the teacher yields them, and read one chunk at a time, so
both directions work on the file itself. The files are valid Zarr v3 (tested: byte-identical to zarr's own).

Shard file: the chunks, then the index (offset and length of each chunk, uint64 little-endian), then CRC-32C of the
index. Chunk: array bytes, through Blosc (zstd) where the array is compressed, then CRC-32C. Blosc alone silently
returns wrong data after a flipped bit; the checksum turns damage into an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
from numcodecs import blosc

BLOCK = 64
"""Samples per block: the unit of I/O, of shuffling and of resuming."""


RESIDUE = 0x48674BC7
"""CRC-32C of any bytes followed by their CRC-32C in little-endian order."""


Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]


class ChunkError(ValueError):
    """A chunk's or an index's bytes are damaged. The store adds location and fix."""


SHUFFLES: dict[Shuffle, int] = {
    "noshuffle": blosc.NOSHUFFLE,
    "shuffle": blosc.SHUFFLE,
    "bitshuffle": blosc.BITSHUFFLE,
}
"""What Blosc does before it compresses, by the names that zarr gives it."""
SYMBOL_SHUFFLES: tuple[Shuffle, ...] = ("noshuffle", "bitshuffle")
"""Those that are useful for bytes."""


def encode_chunk(array: np.ndarray, level: int, shuffle: Shuffle = "bitshuffle") -> bytes:
    """An array's bytes with their checksum, compressed in one piece unless ``level`` is 0."""
    array = np.ascontiguousarray(array)
    if level == 0:
        data = array.tobytes()
    else:
        # Pieces of the size that Blosc chooses take longer to decompress.
        data = blosc.compress(array, b"zstd", level, shuffle=SHUFFLES[shuffle], blocksize=array.nbytes)
    return data + _checksum(data)


def decode_chunk(
    data: bytes, shape: tuple[int, ...], dtype: str, *, level: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Inverse of ``encode_chunk``; read-only where the bytes are used in place. ``out``: a contiguous array of this
    shape and type to decompress into.

    Raises:
        ChunkError: the checksum or the size is wrong.
    """
    if not is_sound(data):
        raise ChunkError("the chunk's checksum does not match its bytes")
    body = memoryview(data)[:-4]
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if level:
        if len(body) < 16 or int.from_bytes(body[4:8], "little") != size:
            raise ChunkError("the chunk does not decompress to its array's size")
        array = np.empty(shape, dtype=dtype) if out is None else out
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


ABSENT = 2**64 - 1
"""Offset and length, in an index, of a chunk that was never written, which Zarr reads as zeros."""

Span = tuple[int, int]
"""Offset and length of a chunk in its shard file."""


def index_size(chunks: int) -> int:
    return 16 * chunks + 4


def encode_index(spans: Sequence[Span]) -> bytes:
    """The shard index for chunks at (offset, length), in C order of the chunk grid."""
    data = np.array(spans, dtype="<u8").tobytes()
    return data + _checksum(data)


def decode_index(data: bytes, chunks: int, *, absent: bool = False) -> np.ndarray:
    """Offsets and lengths, int64 (chunks, 2), from the last ``index_size(chunks)`` bytes of a shard file.

    Args:
        absent: whether chunks may be absent, because all of their values are zero; they have length 0. Otherwise an
            absent chunk is damage.
    """
    if len(data) != index_size(chunks) or not is_sound(data):
        raise ChunkError("the shard's index is damaged or truncated")
    spans = np.frombuffer(data[:-4], dtype="<u8").reshape(chunks, 2)
    if absent:
        spans = np.where((spans == ABSENT).all(axis=1, keepdims=True), 0, spans)
    if spans.size and spans.max() >= 2**63:
        raise ChunkError("the shard's index lists a chunk that was never written")
    return spans.astype(np.int64)


class ShardFile:
    """Writes one shard file, block by block. ``close`` writes the index.

    Args:
        path: the file.
        grid: the chunks along every axis but that of the blocks, whose place is None: ``(2, 8, None, 1)``.
    """

    def __init__(self, path: Path, grid: tuple[int | None, ...]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._grid = grid
        self._spans: list[Span] = []
        self._offset = 0

    def append(self, chunks: Sequence[bytes]) -> None:
        """Append the chunks of one block, in C order of the grid; an empty one is absent."""
        for chunk in chunks:
            self._file.write(chunk)
            self._spans.append((self._offset, len(chunk)) if chunk else (ABSENT, ABSENT))
            self._offset += len(chunk)

    def abort(self) -> None:
        self._file.close()

    def close(self) -> None:
        self._file.write(encode_index(ordered_spans(self._spans, self._grid)))
        self._file.close()


def ordered_spans(spans: Sequence[Span], grid: tuple[int | None, ...]) -> list[Span]:
    """Spans in order of blocks, and of the grid within a block, rearranged into C order of the whole grid."""
    axis = grid.index(None)
    rest = tuple(side for side in grid if side is not None)
    by_block = np.array(spans, dtype="<u8").reshape(-1, *rest, 2)
    return [(int(offset), int(length)) for offset, length in np.moveaxis(by_block, 0, axis).reshape(-1, 2)]
