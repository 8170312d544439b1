"""Writes a store, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cae2pipe.images.views import DRAW_COLUMNS
from cae2pipe.targets.chunks import BLOCK, SYMBOL_SHUFFLES, ShardFile, encode_chunk
from cae2pipe.targets.planes import chunk_components, split_symbols
from cae2pipe.targets.records import HEAD, SAMPLES, Records, pack_records, record_fields
from cae2pipe.targets.store_layout import SYMBOLS, StoreLayout

Chunks = Mapping[str, Sequence[bytes]]
"""The chunks of a block, by array (``patches/norms``); an empty one holds zeros and is not stored."""


def pack_block(layout: StoreLayout, arrays: Mapping[str, np.ndarray]) -> dict[str, list[bytes]]:
    """The chunks of up to 64 samples: padded to a whole block, compressed, with checksums."""
    chunks = {}
    for name, spec in layout.blocked().items():
        array = np.asarray(arrays[name], dtype=spec.dtype)
        whole = f"{layout.group}/{name}"
        if name == SYMBOLS:
            chunks[whole] = pack_symbols(array, spec.level)
        else:
            chunks[whole] = [encode_chunk(_padded(array, 0), spec.level)]
    return chunks


def pack_symbols(symbols: np.ndarray, level: int) -> list[bytes]:
    """The chunks of the symbols (D, n, T) uint16 of a block: low bytes, then high bytes, each by components.

    Each is shuffled by bits or not at all, whichever takes fewer bytes: zstd's entropy coder compresses whole bytes
    best where they are filled, as of the first components at fine steps, and bits where most are zero. Blosc notes the
    shuffle in the chunk.
    """
    planes = split_symbols(_padded(symbols, 1))
    side = chunk_components(len(symbols))
    parts = (_padded(plane[first : first + side], 0, side) for plane in planes for first in range(0, len(plane), side))
    return [
        min((encode_chunk(part, level, shuffle) for shuffle in SYMBOL_SHUFFLES), key=len) if part.any() else b""
        for part in parts
    ]


def packed_bytes(chunks: Chunks) -> int:
    return sum(len(chunk) for parts in chunks.values() for chunk in parts)


def _padded(array: np.ndarray, axis: int, side: int = BLOCK) -> np.ndarray:
    """With zeros at the end of an axis: zarr requires that a chunk is whole."""
    missing = side - array.shape[axis]
    if not missing:
        return array
    return np.concatenate(
        [array, np.zeros((*array.shape[:axis], missing, *array.shape[axis + 1 :]), dtype=array.dtype)], axis=axis
    )


class StoreWriter:
    """Writes one store, block by block, into the folder ``path``; ``finish`` makes it a Zarr group.

    Args:
        path: the folder.
        layouts: of its groups.
    """

    def __init__(self, path: Path, *layouts: StoreLayout):
        self.path = path
        self.layouts = layouts
        self.samples = 0
        self._arrays = {
            f"{layout.group}/{name}": layout.stored(name) for layout in layouts for name in layout.blocked()
        }
        self._files = {
            name: ShardFile(path / name / stored.data_path, stored.grid) for name, stored in self._arrays.items()
        }

    def append(self, chunks: Chunks, samples: int) -> None:
        """Append a packed block of up to 64 samples. Only the last block may be shorter."""
        assert self.samples % BLOCK == 0, "a short block must be the last one"
        for name, file in self._files.items():
            file.append(chunks[name])
        self.samples += samples

    def finish(self, records: Records, attributes: Mapping[str, Any]) -> None:
        """Write the records and the metadata."""
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec

        for file in self._files.values():
            file.close()
        assert len(records) == self.samples
        group = zarr.create_group(
            self.path, zarr_format=3, attributes={**attributes, "draw_columns": list(DRAW_COLUMNS)}
        )
        for layout in self.layouts:
            group.create_group(layout.group, attributes={"codec": layout.codec.name})
        for name, stored in self._arrays.items():
            spec = stored.spec
            blosc = BloscCodec(
                cname="zstd",
                clevel=spec.level,
                shuffle="bitshuffle",
                blocksize=stored.chunk_bytes,
                typesize=np.dtype(stored.dtype).itemsize,
            )
            group.create_array(
                name,
                shape=stored.shape(self.samples),
                chunks=stored.chunk,
                shards=stored.shard(self.samples),
                dtype=stored.dtype,
                compressors=[blosc, Crc32cCodec()] if spec.level else [Crc32cCodec()],
                filters=None,
                fill_value=0,
                # The shard files are there already.
                overwrite=False,
            )
        rows = pack_records(records)
        array = group.create_array(
            SAMPLES,
            shape=rows.shape,
            chunks=rows.shape,
            dtype=rows.dtype,
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            attributes={"fields": record_fields(rows.shape[1] - HEAD)},
            # Otherwise zarr omits a chunk of zeros, and it is read back without a check.
            config={"write_empty_chunks": True},
        )
        array[...] = rows

    def close(self) -> None:
        """Abandon the store and close its files."""
        for file in self._files.values():
            file.abort()
