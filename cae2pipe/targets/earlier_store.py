"""Reads a store of the formats before 4: whole symbols in one array, and an array for each fact of a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cae2pipe.artifacts.manifest_targets import StoreUnit
from cae2pipe.artifacts.storage import file_size, read_bytes, read_range
from cae2pipe.errors import DamageError
from cae2pipe.images.views import DRAW_COLUMNS
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.targets.chunks import BLOCK, ChunkError, decode_chunk, decode_index, index_size
from cae2pipe.targets.records import Records
from cae2pipe.targets.store_layout import StoreLayout

FIX = (
    "remove the file and run the same command again: the store is then omitted, and `cae2pipe extract-targets` with "
    "the arguments of before makes it again in the new set"
)


class EarlierStore:
    """One store, read block by block.

    Args:
        root: the set's folder. unit: the store's manifest entry. layout: of its latents.
    """

    def __init__(self, root: Path, unit: StoreUnit, layout: StoreLayout):
        self.path = root / unit["zarr"]
        self.samples = unit["samples"]
        self.blocks = -(-self.samples // BLOCK)
        self.layout = layout
        self._spans: dict[str, np.ndarray] = {}

    def arrays(self, block: int) -> dict[str, np.ndarray]:
        """The arrays of a block as the codec made them, without padding.

        Raises:
            DamageError: a chunk is missing, truncated or changed.
        """
        count, result = min(BLOCK, self.samples - block * BLOCK), {}
        for name, spec in self.layout.blocked().items():
            shape = self.layout.shape(name, BLOCK)
            path = self.path.joinpath(name, "c", *("0",) * len(shape))
            try:
                if name not in self._spans:
                    self._spans[name] = self._read_index(path)
                data = read_range(path, *self._spans[name][block].tolist())
                array = decode_chunk(data, shape, spec.dtype, level=spec.level)
            except (ChunkError, OSError) as error:
                raise _damage(error, path) from None
            result[name] = array[(slice(None),) * spec.sample_axis + (slice(0, count),)]
        return result

    def records(self) -> Records:
        """What the store says of all samples. Raises DamageError."""
        keys = self._small("keys", "|u1", None)
        try:
            return Records(
                [row.tobytes().rstrip(b"\0").decode("utf-8") for row in keys],
                self._small("labels", "<i4", ()),
                self._small("draws", "<f8", (len(DRAW_COLUMNS),)),
                self._small("members", "<i8", (3,)),
            )
        except UnicodeDecodeError as error:
            raise _damage(error, self.path / "keys") from None

    def _read_index(self, path: Path) -> np.ndarray:
        size, total = index_size(self.blocks), file_size(path)
        if total is None:
            raise FileNotFoundError(path)
        return decode_index(read_range(path, max(0, total - size), size), self.blocks)

    def _small(self, name: str, dtype: str, rest: tuple[int, ...] | None) -> np.ndarray:
        path = self.path.joinpath(name, "c", *("0",) * (1 if rest == () else 2))
        try:
            data = read_bytes(path)
            shape = (self.samples, *(rest if rest is not None else ((len(data) - 4) // self.samples,)))
            return decode_chunk(data, shape, dtype, level=0)
        except (ChunkError, OSError) as error:
            raise _damage(error, path) from None


def _damage(error: Exception, path: Path) -> DamageError:
    reraise_exhaustion(error)
    what = "a file is missing" if isinstance(error, FileNotFoundError) else str(error)
    return DamageError(f"stored data are damaged: {what}", where=path, fix=FIX)
