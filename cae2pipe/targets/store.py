"""Reads a store, of the layout in ``store_layout.py``, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from cae2pipe.artifacts.manifest_targets import StoreUnit
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import file_size, is_local, read_bytes, read_range
from cae2pipe.errors import DamageError, command
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.chunks import BLOCK, ChunkError, decode_chunk, decode_index, index_size
from cae2pipe.targets.planes import HIGH, LOW, PLANES, merge_symbols, spare_arrays
from cae2pipe.targets.records import SAMPLES, Records, unpack_records
from cae2pipe.targets.shared_pixels import no_pixels
from cae2pipe.targets.store_layout import SYMBOLS, StoreLayout, array_name, arrays_of


def rebuild_fix(root: Path) -> str:
    """The remedy for what is missing or damaged in the target set ``root``."""
    return (
        f"`{command('verify', root, '--repair')}` rebuilds it; add --source SHARDS if the shard set is elsewhere, "
        "--pixels FOLDER if the pixels are"
    )


@dataclass(frozen=True)
class StoredBlock:
    """Up to 64 samples of one view: keys, labels, JPEG bytes (of the view, or of the image that it is cut from), draws
    (b, 11), and the arrays over those samples, by ``array_name``."""

    keys: list[str]
    labels: np.ndarray
    jpegs: list[bytes]
    draws: np.ndarray
    arrays: dict[str, np.ndarray]


def unpack_array(layout: StoreLayout, name: str, chunks: Sequence[bytes], count: int) -> dict[str, np.ndarray]:
    """An array of a block in the form in which loaders read it, from its chunks: inverse of ``pack_block``.

    Args:
        count: samples of the block.

    Raises:
        ChunkError: a chunk is damaged.
    """
    if name == SYMBOLS:
        return _planes(layout, chunks, count)
    stored = layout.stored(name)
    return {name: decode_chunk(chunks[0], stored.chunk, stored.dtype, level=stored.spec.level)[:count]}


def _planes(layout: StoreLayout, chunks: Sequence[bytes], count: int) -> dict[str, np.ndarray]:
    """The planes of a block from its chunks: low bytes of all components, then high bytes."""
    dim, wide, stored = layout.dim, layout.codec.wide, layout.stored(SYMBOLS)
    side, shape, level = stored.part[1], stored.chunk[1:], stored.spec.level
    planes = {
        LOW: np.empty((dim, BLOCK, layout.tokens), dtype=np.uint8),
        HIGH: np.zeros((wide, BLOCK, layout.tokens), dtype=np.uint8),
    }
    firsts = range(0, dim, side)
    spare = []
    for first, low, high in zip(firsts, chunks[: len(firsts)], chunks[len(firsts) :], strict=True):
        into = planes[LOW][first : first + side]  # fewer in the last one
        if not low:
            into[...] = 0
        elif len(into) == side:
            decode_chunk(low, shape, "|u1", level=level, out=into)
        else:
            into[...] = decode_chunk(low, shape, "|u1", level=level)[: len(into)]
        if high:
            array = decode_chunk(high, shape, "|u1", level=level)
            if array[len(into) :].any() or array[:, count:].any():
                raise ChunkError("the padding of a chunk is not zero")
            dense = planes[HIGH][first : first + side]
            dense[...] = array[: len(dense)]
            spare.append((first + len(dense), array[len(dense) :]))
    return {**{name: plane[:, :count] for name, plane in planes.items()}, **spare_arrays(spare, count)}


class StoreReader:
    """Reads blocks of one store and of its tar. Opens nothing until the first read.

    Args:
        root: the set's folder. unit: the store's manifest entry. layout: of the group to read.
        more: of other groups to read; their arrays are named as by ``array_name``.
        cache: local copies of pieces of remote files.
        pixels: the folder with the pixels. None: ``root``, or of a set by reference unknown.
    """

    def __init__(
        self,
        root: Path,
        unit: StoreUnit,
        layout: StoreLayout,
        *,
        more: Sequence[StoreLayout] = (),
        cache: BlockCache | None = None,
        pixels: Path | None = None,
    ):
        self.root = root
        self.pixels = pixels or root
        referred = unit.get("pixels", {})
        self._files = {**unit.get("files", {}), **referred}
        self._cache = cache
        self._tar = unit["tar"]
        self._unknown = pixels is None and self._tar in referred
        self.tar = self.pixels / self._tar
        self.path: Path = root / unit["zarr"]
        self.samples: int = unit["samples"]
        self.blocks = -(-self.samples // BLOCK)
        self.layout = layout
        # Looked up once, since every block needs it.
        self._groups = {array_name(own.group, name): (own, name) for own in (layout, *more) for name in own.blocked()}
        self._stored = {whole: own.stored(name) for whole, (own, name) in self._groups.items()}
        self._paths = {
            whole: root / own.path(unit["zarr"], name) / self._stored[whole].data_path
            for whole, (own, name) in self._groups.items()
        }
        self._spans: dict[str, np.ndarray] = {}
        self._rows: np.ndarray | None = None

    def records(self, block: int | None = None) -> Records:
        """What the store says of all samples, in order, or of those of a block.

        Raises:
            DamageError: the records are missing or changed.
        """
        path = self.path / SAMPLES / "c" / "0" / "0"
        try:
            if self._rows is None:
                data = read_bytes(path) if is_local(path) else self._read(path, 0, self._entry(path)["bytes"])
                self._rows = decode_chunk(data, (self.samples, (len(data) - 4) // self.samples), "|u1", level=0)
            return unpack_records(self._rows if block is None else self._rows[block * BLOCK : (block + 1) * BLOCK])
        except (ValueError, OSError) as error:
            raise self._damage(error, str(path)) from None

    def arrays(self, block: int, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The groups' arrays of one block, without its padding, as the codec made them. All of them by default.

        Raises:
            DamageError: a chunk is missing, truncated or changed; the message names store and block.
        """
        wanted = [name for name in self._stored if names is None or name in names]
        symbols = {whole: own.group for whole, (own, name) in self._groups.items() if name == SYMBOLS}
        planes = [array_name(symbols[name], plane) for name in wanted if name in symbols for plane in PLANES]
        loaded = self.loaded(block, [*wanted, *planes])
        return {
            name: merge_symbols(arrays_of(symbols[name], loaded)) if name in symbols else loaded[name]
            for name in wanted
        }

    def loaded(self, block: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """As ``arrays``, in the form in which loaders read them: symbols as planes."""
        count = min(BLOCK, self.samples - block * BLOCK)
        result: dict[str, np.ndarray] = {}
        for whole, (own, name) in self._groups.items():
            wanted = array_name(own.group, LOW) in names if name == SYMBOLS else whole in names
            if not wanted:
                continue
            try:
                unpacked = unpack_array(own, name, self._chunks(whole, block), count)
            except (ChunkError, OSError) as error:
                raise self._damage(error, f"{self._paths[whole]}, block {block}") from None
            result |= {array_name(own.group, part): array for part, array in unpacked.items()}
        return result

    def jpegs(self, block: int) -> list[bytes]:
        """The JPEG bytes of one block: one ranged read, since the members of a block are contiguous.

        Raises:
            DamageError: the tar is missing or too short, or a JPEG's bytes have changed.
            SettingsError: nobody said where the pixels of a set by reference lie.
        """
        return self._jpegs(self.records(block), block)

    def block(self, block: int, names: Sequence[str] | None = None) -> StoredBlock:
        """Everything in one block; ``names`` selects arrays as in ``arrays``."""
        return self._block(block, self.arrays(block, names))

    def loaded_block(self, block: int, names: Sequence[str]) -> StoredBlock:
        """Everything in one block, with arrays as in ``loaded``."""
        return self._block(block, self.loaded(block, names))

    def _block(self, block: int, arrays: dict[str, np.ndarray]) -> StoredBlock:
        records = self.records(block)
        return StoredBlock(records.keys, records.labels, self._jpegs(records, block), records.draws, arrays)

    def _jpegs(self, records: Records, block: int) -> list[bytes]:
        if self._unknown:
            raise no_pixels(self.root, self._tar)
        members = records.members
        start, end = int(members[0, 0]), int(members[-1, :2].sum())
        try:
            data = self._read(self.tar, start, end - start)
        except (ChunkError, OSError) as error:
            raise self._damage(error, f"{self.tar}, block {block}", self.pixels) from None
        jpegs = []
        for key, (offset, length, checksum) in zip(records.keys, members.tolist(), strict=True):
            jpeg = data[offset - start : offset - start + length]
            if google_crc32c.value(jpeg) != checksum:
                changed = ChunkError("a JPEG's checksum does not match")
                raise self._damage(changed, f"{self.tar}, key {key}", self.pixels)
            jpegs.append(jpeg)
        return jpegs

    def _chunks(self, name: str, block: int) -> list[bytes]:
        """The chunks of a block in C order of the grid, by one read, since they are adjacent; absent ones are empty."""
        path = self._paths[name]
        if name not in self._spans:
            self._spans[name] = self._read_index(name)
        spans = self._spans[name][block].tolist()
        present = [(offset, length) for offset, length in spans if length]
        if not present:
            return [b""] * len(spans)
        start = min(offset for offset, _ in present)
        stop = max(offset + length for offset, length in present)
        if stop - start != sum(length for _, length in present):
            raise ChunkError("the chunks of the block are not adjacent")
        data = self._read(path, start, stop - start)
        return [data[offset - start : offset - start + length] if length else b"" for offset, length in spans]

    def _read_index(self, name: str) -> np.ndarray:
        """Offsets and lengths of all chunks, int64 (blocks, chunks of a block, 2)."""
        path, grid = self._paths[name], self._stored[name].grid
        size = index_size(self.blocks * self._stored[name].chunks)
        total = file_size(path) if is_local(path) else self._entry(path)["bytes"]
        if total is None:
            raise FileNotFoundError(path)
        if total < size:
            raise ChunkError("the shard file is truncated")
        spans = decode_index(
            self._read(path, total - size, size),
            self.blocks * self._stored[name].chunks,
            absent=self._groups[name][1] == SYMBOLS,
        )
        axis = grid.index(None)
        by_axis = spans.reshape(*(self.blocks if side is None else side for side in grid), 2)
        return np.moveaxis(by_axis, axis, 0).reshape(self.blocks, -1, 2)

    def _entry(self, path: Path) -> FileEntry:
        """The manifest's entry of a file. Raises ChunkError if there is none."""
        entry = self._files.get(self._tar if path == self.tar else path.relative_to(self.root).as_posix())
        if entry is None:
            raise ChunkError("the manifest does not list this file")
        return entry

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        if self._cache is None or is_local(path):
            return _read(path, offset, length)
        return self._cache.read(self._entry(path)["sha256"], offset, length, fetch=lambda: _read(path, offset, length))

    def _damage(self, error: Exception, where: str, root: Path | None = None) -> DamageError:
        reraise_exhaustion(error)
        what = "a file is missing" if isinstance(error, FileNotFoundError) else str(error)
        return DamageError(
            f"stored data are damaged: {what}",
            where=where,
            fix=rebuild_fix(root or self.root),
        )


def _read(path: Path, offset: int, length: int) -> bytes:
    data = read_range(path, offset, length)
    if len(data) != length:
        raise ChunkError(f"the file ends {length - len(data)} bytes too early")
    return data
