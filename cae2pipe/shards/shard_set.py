"""A shard set, opened for reading.

OUT/manifest.json
OUT/tars/000000.tar          WebDataset tars of originals, shuffled over the whole source
OUT/tars/000000.json         each sample's position in the tar, and its checksum
OUT/listing-000.jsonl.gz     the source's images, path and bytes, from which the tars' order is drawn
OUT/rejects.jsonl            images that could not be decoded: path and reason, one per line
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import google_crc32c
from pydantic import Field, TypeAdapter, ValidationError

from cae2pipe.artifacts.artifact import ShardsArtifact
from cae2pipe.artifacts.digest import sha256_bytes
from cae2pipe.artifacts.manifest_shards import TarUnit
from cae2pipe.artifacts.storage import read_bytes
from cae2pipe.errors import DamageError, SourceError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.tar import index_tar, read_tar_range

KIND = "shards"
REJECTS = "rejects"
"""The unit of ``rejects.jsonl``."""

REMEDY = "`cae2pipe verify FOLDER --repair --source IMAGES` rebuilds it"


class IndexedSample(NamedTuple):
    """One sample of a tar: its key, its label (-1: none), and the position of its image's bytes, with their CRC-32C.

    The limits apply when an index is read.
    """

    key: str
    label: Annotated[int, Field(ge=-1, lt=2**31)]
    offset: Annotated[int, Field(ge=0, lt=2**53)]
    size: Annotated[int, Field(ge=0, lt=2**53)]
    crc32c: Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Shard:
    """One tar, from the manifest."""

    name: str
    samples: int
    path: Path
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class ImageSample:
    """One original: its key, its label (-1: none) and its file's bytes."""

    key: str
    label: int
    data: bytes


@dataclass(frozen=True, repr=False)
class ShardSet:
    """The shards in order and the names of their labels. ``remedy``: how to repair damage. ``licence``: of the images,
    if it is known."""

    root: Path
    classes: list[str]
    shards: list[Shard]
    remedy: str = REMEDY
    licence: str | None = None

    def __repr__(self) -> str:
        held = (
            counted(self.images, "image"),
            counted(len(self.classes), "class", "classes"),
            counted(len(self.shards), "tar"),
        )
        return f"ShardSet({str(self.root)!r}: {', '.join(held)})"

    @classmethod
    def open(cls, root: Path) -> ShardSet:
        """Read the manifest.

        Raises:
            ManifestError: not a shard set.
        """
        artifact = ShardsArtifact.open(root)
        # A tar is empty if all of its images were rejected.
        tars = ((name, unit) for name, unit in sorted(artifact.units.items()) if "rejected" in unit)
        shards = [make_shard(root, name, unit) for name, unit in tars if unit["samples"]]
        return cls(root, artifact.identity["classes"], shards, licence=artifact.facts.get("licence"))

    @classmethod
    def open_with_images(cls, root: Path) -> ShardSet:
        """The same, for a set that has at least one image so far. Raises SourceError besides."""
        shards = cls.open(root)
        if not shards.images:
            raise SourceError(
                "this shard set holds no image",
                where=root,
                fix="run `cae2pipe shard` with the same arguments as before, to finish it; rejects.jsonl tells which "
                "images cannot be decoded",
            )
        return shards

    @property
    def images(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def index(self, shard: Shard) -> list[IndexedSample]:
        """The positions of the shard's samples.

        Raises:
            DamageError: the index is missing, has changed, or has another number of samples.
        """
        try:
            return _index(shard)
        except DamageError as error:
            raise DamageError(error.what, where=error.where, fix=self.remedy) from None

    def read(self, shard: Shard, low: int, high: int) -> list[ImageSample]:
        """Samples [low, high) of a shard, in one ranged read.

        Raises:
            DamageError: as ``index``; or the tar is missing or too short, or an image's bytes have changed.
        """
        wanted = self.index(shard)[low:high]
        if not wanted:
            return []
        start = wanted[0].offset
        try:
            data = read_tar_range(shard.path, start, wanted[-1].offset + wanted[-1].size - start)
        except DamageError as error:
            raise DamageError(error.what, where=error.where, fix=self.remedy) from None
        samples = []
        for key, label, offset, size, checksum in wanted:
            image = data[offset - start : offset - start + size]
            if google_crc32c.value(image) != checksum:
                raise DamageError(
                    "the tar has changed since it was written", where=f"{shard.path}, key {key}", fix=self.remedy
                )
            samples.append(ImageSample(key, label, image))
        return samples


def read_image(tar: Path, offset: int, size: int, *, crc32c: int) -> bytes:
    """One image's bytes from a tar.

    Raises:
        DamageError: the tar is missing or too short, or the bytes have changed.
    """
    try:
        image = read_tar_range(tar, offset, size)
    except DamageError as error:
        raise DamageError(error.what, where=error.where, fix=REMEDY) from None
    if google_crc32c.value(image) != crc32c:
        raise DamageError("the tar has changed since it was written", where=f"{tar}, byte {offset}", fix=REMEDY)
    return image


def make_shard(root: Path, name: str, unit: TarUnit) -> Shard:
    """A tar from the manifest's entry."""
    tar, index = (unit["files"][path]["sha256"] for path in (tar_path(name), index_path(name)))
    return Shard(name, unit["samples"], root / tar_path(name), tar, index)


def tar_path(name: str) -> str:
    return f"tars/{name}.tar"


def index_path(name: str) -> str:
    return f"tars/{name}.json"


def index_samples(tar: Path, checksums: Sequence[int]) -> list[IndexedSample]:
    """The positions of a tar's samples, given their images' CRC-32C in order."""
    return [
        IndexedSample(sample.key, sample.label, sample.offset, sample.size, checksum)
        for sample, checksum in zip(index_tar(tar), checksums, strict=True)
    ]


def write_index(path: Path, tar: Path, checksums: Sequence[int]) -> None:
    """Write the index of a local tar, given its images' CRC-32C in order: one line per sample."""
    lines = ",\n".join(json.dumps(row) for row in index_samples(tar, checksums))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


@functools.lru_cache(maxsize=16)
def _index(shard: Shard) -> list[IndexedSample]:
    path = shard.path.with_suffix(".json")
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DamageError("the tar's index is missing", where=path) from None
    except OSError as error:
        reraise_exhaustion(error)
        raise DamageError(f"the tar's index cannot be read: {error.strerror}", where=path) from None
    if sha256_bytes(data) != shard.index_sha256:
        raise DamageError("the tar's index has changed since it was written", where=path)
    try:
        rows: list[IndexedSample] = _rows().validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise DamageError(f"the tar's index is invalid: {field}: {first['msg']}", where=path) from None
    if len(rows) != shard.samples:
        raise DamageError(f"the tar's index has {len(rows)} samples, but the manifest says {shard.samples}", where=path)
    return rows


@functools.cache
def _rows() -> TypeAdapter[list[IndexedSample]]:
    return TypeAdapter(list[IndexedSample])
