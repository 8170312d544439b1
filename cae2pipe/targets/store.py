"""One store: the latents of one view of one shard, as a Zarr v3 group, and the tar that its pixels come from.

Arrays, n samples, T tokens, D dimensions, P patches:

    symbols (D, n, T) | tokens (n, T, D)   the codec's main array, in chunks of 64 samples (and `scales` for int8)
    norms        (n, T) float16            token norms before normalisation, in chunks of 64 samples
    attention    (n, P) uint8              the teacher's class-to-patch attention, largest = 255; ViT teachers only
    draws        (n, 11) float64           crop box, flip, jitter: columns named in the attribute `draw_columns`
    labels       (n,) int32                -1: none
    keys         (n, K) uint8              UTF-8, padded with zeros
    members      (n, 3) int64              offset, length and CRC-32C of the sample's JPEG in the tar: of the view, or
                                           of the image that the view is cut from again by its draw

Only this module knows the layout. Reading goes to the files directly; ``zarr.open_group`` reads the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cae2pipe.artifacts.manifest_targets import StoreUnit
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import file_size, is_local, read_bytes, read_range
from cae2pipe.errors import DamageError
from cae2pipe.images.views import DRAW_COLUMNS
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.chunks import BLOCK, ChunkError, ShardFile, decode_chunk, decode_index, encode_chunk, index_size
from cae2pipe.targets.codecs import ArraySpec, Codec

REMEDY = "`cae2pipe verify {root} --repair` rebuilds it; add --source SHARDS if the shard set is elsewhere"

SIDE_LEVEL = 1
"""zstd level of norms and attention: both are small compared with the latents."""


@dataclass(frozen=True)
class StoreLayout:
    """Shape of a store's contents, the same for all stores of a set."""

    tokens: int
    dim: int
    patches: int
    attention: bool
    codec: Codec

    def blocked(self) -> dict[str, ArraySpec]:
        """The arrays that are chunked by block."""
        arrays = dict(self.codec.arrays())
        arrays["norms"] = ArraySpec("<f2", 0, SIDE_LEVEL)
        if self.attention:
            arrays["attention"] = ArraySpec("|u1", 0, SIDE_LEVEL)
        return arrays

    def sample_axes(self) -> dict[str, int]:
        """The sample axis of each blocked array."""
        return {name: spec.sample_axis for name, spec in self.blocked().items()}

    def shape(self, name: str, samples: int) -> tuple[int, ...]:
        """Shape of a blocked array over ``samples`` samples."""
        return {
            "symbols": (self.dim, samples, self.tokens),
            "tokens": (samples, self.tokens, self.dim),
            "scales": (samples, self.tokens),
            "norms": (samples, self.tokens),
            "attention": (samples, self.patches),
        }[name]

    def chunk_bytes(self, name: str) -> int:
        """Uncompressed bytes of a whole chunk of a blocked array."""
        return math.prod(self.shape(name, BLOCK)) * np.dtype(self.blocked()[name].dtype).itemsize

    def latent_bytes(self, zarr: str, files: Mapping[str, Mapping[str, Any]]) -> int:
        """Bytes of the latents (the codec's arrays and the norms) among the files of the store at ``zarr``."""
        arrays = tuple(f"{zarr}/{name}/" for name in (*self.codec.arrays(), "norms"))
        return sum(entry["bytes"] for path, entry in files.items() if path.startswith(arrays))


@dataclass(frozen=True)
class StoredBlock:
    """Up to 64 samples of one view: keys, labels, JPEG bytes (of the view, or of the image that it is cut from), draws
    (b, 11), and the codec's arrays over those samples."""

    keys: list[str]
    labels: np.ndarray
    jpegs: list[bytes]
    draws: np.ndarray
    arrays: dict[str, np.ndarray]


def pack_block(layout: StoreLayout, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The chunks of up to 64 samples, by array: padded to a whole block, compressed, with checksums."""
    chunks = {}
    for name, spec in layout.blocked().items():
        array = arrays[name]
        count = array.shape[spec.sample_axis]
        if count < BLOCK:
            # zarr requires the shard's sample axis to be a multiple of the chunk's.
            padded = np.zeros(layout.shape(name, BLOCK), dtype=spec.dtype)
            padded[(slice(None),) * spec.sample_axis + (slice(0, count),)] = array
            array = padded
        chunks[name] = encode_chunk(
            np.asarray(array, dtype=spec.dtype), spec.level, spec.shuffle, one_block=spec.one_block
        )
    return chunks


class StoreWriter:
    """Writes one store, block by block, into the folder ``path``; ``finish`` makes it a Zarr group."""

    def __init__(self, path: Path, layout: StoreLayout):
        self.path = path
        self.layout = layout
        self.samples = 0
        self._files = {name: ShardFile(self._shard_path(name)) for name in layout.blocked()}

    def append(self, chunks: Mapping[str, bytes], samples: int) -> None:
        """Append a packed block of up to 64 samples. Only the last block may be shorter."""
        assert self.samples % BLOCK == 0, "a short block must be the last one"
        for name, file in self._files.items():
            file.append(chunks[name])
        self.samples += samples

    def finish(
        self,
        keys: Sequence[str],
        labels: np.ndarray,
        draws: np.ndarray,
        *,
        members: np.ndarray,
        attributes: Mapping[str, Any],
    ) -> None:
        """Write the small arrays and the metadata, sync everything to disk, and rename the store to its final name."""
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec

        for file in self._files.values():
            file.close()
        assert len(keys) == len(labels) == len(draws) == len(members) == self.samples
        group = zarr.create_group(
            self.path, zarr_format=3, attributes={**attributes, "draw_columns": list(DRAW_COLUMNS)}
        )
        for name, spec in self.layout.blocked().items():
            size = self.layout.chunk_bytes(name) if spec.one_block else 0
            blosc = (
                BloscCodec(cname="zstd", clevel=spec.level, shuffle=spec.shuffle, blocksize=size)
                if spec.level
                else None
            )
            group.create_array(
                name,
                shape=self.layout.shape(name, self.samples),
                chunks=self.layout.shape(name, BLOCK),
                shards=self.layout.shape(name, _round_up(self.samples)),
                dtype=spec.dtype,
                compressors=[codec for codec in (blosc, Crc32cCodec()) if codec],
                filters=None,
                fill_value=0,
                # The shard files are there already.
                overwrite=False,
            )
        encoded = [key.encode("utf-8") for key in keys]
        width = max(len(key) for key in encoded)
        key_bytes = np.array([list(key.ljust(width, b"\0")) for key in encoded], dtype="u1")
        small = {"labels": labels.astype("<i4"), "keys": key_bytes, "draws": draws.astype("<f8")}
        for name, data in {**small, "members": members.astype("<i8")}.items():
            array = group.create_array(
                name,
                shape=data.shape,
                chunks=data.shape,
                dtype=data.dtype,
                compressors=[Crc32cCodec()],
                filters=None,
                fill_value=0,
                # Otherwise zarr omits a chunk of zeros (labels of one class), and it is read back without a check.
                config={"write_empty_chunks": True},
            )
            array[...] = data

    def close(self) -> None:
        """Abandon the store and close its files."""
        for file in self._files.values():
            file.abort()

    def _shard_path(self, name: str) -> Path:
        axes = len(self.layout.shape(name, BLOCK))
        return self.path / name / "c" / Path(*("0",) * axes)


class StoreReader:
    """Reads blocks of one store and of its tar. Opens nothing until the first read.

    Args:
        root: the set's folder. unit: the store's manifest entry. layout: the set's.
        cache: local copies of pieces of remote files.
    """

    def __init__(self, root: Path, unit: StoreUnit, layout: StoreLayout, *, cache: BlockCache | None = None):
        self.root = root
        self._files = unit.get("files", {})
        self._cache = cache
        self.tar = root / unit["tar"]
        self.path: Path = root / unit["zarr"]
        self.samples: int = unit["samples"]
        self.blocks = -(-self.samples // BLOCK)
        self.layout = layout
        # Looked up once, since every block needs it.
        self._blocked = layout.blocked()
        self._shapes = {name: layout.shape(name, BLOCK) for name in self._blocked}
        self._paths = {name: self._shard_path(name) for name in self._blocked}
        self._spans: dict[str, np.ndarray] = {}
        self._small: dict[str, np.ndarray] = {}

    def keys(self) -> list[str]:
        """Keys of all samples, in order."""
        rows = self._small_array("keys", "|u1", None)
        try:
            return [bytes(row).rstrip(b"\0").decode("utf-8") for row in rows]
        except UnicodeDecodeError as error:
            raise self._damage(error, f"{self.path}, keys") from None

    def labels(self) -> np.ndarray:
        """Labels of all samples, int32 (n,); -1: none."""
        return self._small_array("labels", "<i4", ())

    def draws(self) -> np.ndarray:
        """The draws of all samples, float64 (n, 11)."""
        return self._small_array("draws", "<f8", (len(DRAW_COLUMNS),))

    def members(self) -> np.ndarray:
        """Offset, length and CRC-32C of each sample's JPEG in the tar, int64 (n, 3)."""
        return self._small_array("members", "<i8", (3,))

    def arrays(self, block: int, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The blocked arrays of one block, without its padding. All of them by default.

        Raises:
            DamageError: a chunk is missing, truncated or changed; the message names store and block.
        """
        count = min(BLOCK, self.samples - block * BLOCK)
        result = {}
        for name, spec in self._blocked.items():
            if names is not None and name not in names:
                continue
            try:
                if name not in self._spans:
                    self._spans[name] = self._read_index(self._paths[name])
                offset, length = self._spans[name][block].tolist()
                data = self._read(self._paths[name], offset, length)
                chunk = decode_chunk(data, self._shapes[name], spec.dtype, level=spec.level)
            except (ChunkError, OSError) as error:
                raise self._damage(error, f"{self._paths[name]}, block {block}") from None
            result[name] = chunk[(slice(None),) * spec.sample_axis + (slice(0, count),)]
        return result

    def jpegs(self, block: int) -> list[bytes]:
        """The JPEG bytes of one block: one ranged read, since the members of a block are contiguous.

        Raises:
            DamageError: the tar is missing or too short, or a JPEG's bytes have changed.
        """
        members = self.members()[block * BLOCK : (block + 1) * BLOCK]
        start, end = int(members[0, 0]), int(members[-1, :2].sum())
        try:
            data = self._read(self.tar, start, end - start)
        except (ChunkError, OSError) as error:
            raise self._damage(error, f"{self.tar}, block {block}") from None
        jpegs = []
        for position, (offset, length, checksum) in enumerate(members.tolist()):
            jpeg = data[offset - start : offset - start + length]
            if google_crc32c.value(jpeg) != checksum:
                key = self.keys()[block * BLOCK + position]
                raise self._damage(ChunkError("a JPEG's checksum does not match"), f"{self.tar}, key {key}")
            jpegs.append(jpeg)
        return jpegs

    def block(self, block: int, names: Sequence[str] | None = None) -> StoredBlock:
        """Everything in one block; ``names`` selects blocked arrays as in ``arrays``."""
        where = slice(block * BLOCK, (block + 1) * BLOCK)
        draws = self.draws()[where]
        return StoredBlock(
            self.keys()[where], self.labels()[where], self.jpegs(block), draws, self.arrays(block, names)
        )

    def _shard_path(self, name: str) -> Path:
        return self.path.joinpath(name, "c", *("0",) * len(self.layout.shape(name, BLOCK)))

    def _read_index(self, path: Path) -> np.ndarray:
        size = index_size(self.blocks)
        total = file_size(path) if is_local(path) else self._entry(path)["bytes"]
        if total is None:
            raise FileNotFoundError(path)
        if total < size:
            raise ChunkError("the shard file is truncated")
        return decode_index(self._read(path, total - size, size), self.blocks)

    def _entry(self, path: Path) -> FileEntry:
        """The manifest's entry of a file. Raises ChunkError if there is none."""
        entry = self._files.get(path.relative_to(self.root).as_posix())
        if entry is None:
            raise ChunkError("the manifest does not list this file")
        return entry

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        if self._cache is None or is_local(path):
            return _read(path, offset, length)
        return self._cache.read(self._entry(path)["sha256"], offset, length, fetch=lambda: _read(path, offset, length))

    def _small_array(self, name: str, dtype: str, tail: tuple[int, ...] | None) -> np.ndarray:
        if name not in self._small:
            path = self.path.joinpath(name, "c", *("0",) * (1 if tail == () else 2))
            try:
                data = read_bytes(path) if is_local(path) else self._read(path, 0, self._entry(path)["bytes"])
                if tail is None:
                    tail = ((len(data) - 4) // self.samples,)
                self._small[name] = decode_chunk(data, (self.samples, *tail), dtype, level=0)
            except (ChunkError, OSError) as error:
                raise self._damage(error, str(path)) from None
        return self._small[name]

    def _damage(self, error: Exception, where: str) -> DamageError:
        reraise_exhaustion(error)
        what = "a file is missing" if isinstance(error, FileNotFoundError) else str(error)
        return DamageError(
            f"stored data are damaged: {what}",
            where=where,
            fix=REMEDY.format(root=self.root),
        )


def _read(path: Path, offset: int, length: int) -> bytes:
    data = read_range(path, offset, length)
    if len(data) != length:
        raise ChunkError(f"the file ends {length - len(data)} bytes too early")
    return data


def _round_up(samples: int) -> int:
    return -(-samples // BLOCK) * BLOCK
