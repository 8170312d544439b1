"""A shard set, opened for reading.

OUT/manifest.json
OUT/tars/000000.tar      WebDataset tars of originals, shuffled over the whole source
OUT/rejects.jsonl        what could not be decoded: path and reason, a line each
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.artifacts.box import open_box
from cae2pipe.artifacts.digest import sha256_file
from cae2pipe.errors import DamageError
from cae2pipe.shards.tar import TarSample, index_tar, read_range

KIND = "shards"
REJECTS = "rejects"
"""The unit of ``rejects.jsonl``; all others are tars."""

REMEDY = "delete the file, then run `cae2pipe shard` as before: it makes again what is missing"


@dataclass(frozen=True)
class Shard:
    """One tar, from the manifest."""

    name: str
    samples: int
    path: Path
    sha256: str


@dataclass(frozen=True)
class ImageSample:
    """One original: its key, its label (-1: none) and its file's bytes."""

    key: str
    label: int
    data: bytes


@dataclass(frozen=True)
class ShardSet:
    """The shards in order and the names of their labels."""

    root: Path
    classes: list[str]
    shards: list[Shard]

    @classmethod
    def open(cls, root: Path) -> ShardSet:
        """Read the manifest.

        Raises:
            ManifestError: not a shard set.
        """
        box = open_box(root, KIND)
        shards = []
        for name, unit in sorted(box.units.items()):
            if name != REJECTS and unit["samples"]:  # a tar may be empty, if all of its images were rejected
                ((path, entry),) = unit["files"].items()
                shards.append(Shard(name, unit["samples"], root / path, entry["sha256"]))
        return cls(root, list(box.identity["classes"]), shards)

    @property
    def images(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def check(self, shard: Shard) -> None:
        """Read a whole shard and compare its digest with the manifest's.

        Raises:
            DamageError: the tar is missing, or has changed.
        """
        try:
            digest = sha256_file(shard.path)
        except FileNotFoundError:
            raise DamageError("the tar is missing", where=shard.path, fix=REMEDY) from None
        if digest != shard.sha256:
            raise DamageError("the tar has changed since it was written", where=shard.path, fix=REMEDY)

    def index(self, shard: Shard) -> list[TarSample]:
        """Where the shard's samples lie.

        Raises:
            DamageError: the tar is missing or broken, or holds another number of samples than the manifest says.
        """
        return _index(shard)

    def read(self, shard: Shard, low: int, high: int) -> list[ImageSample]:
        """Samples [low, high) of a shard, in one ranged read.

        Raises:
            DamageError: as ``index``.
        """
        wanted = self.index(shard)[low:high]
        if not wanted:
            return []
        start = wanted[0].offset
        try:
            data = read_range(shard.path, start, wanted[-1].offset + wanted[-1].size - start)
        except DamageError as error:
            raise _with_remedy(error) from None
        return [
            ImageSample(sample.key, sample.label, data[sample.offset - start : sample.offset - start + sample.size])
            for sample in wanted
        ]


@functools.lru_cache(maxsize=16)
def _index(shard: Shard) -> list[TarSample]:
    try:
        index = index_tar(shard.path)
    except DamageError as error:
        raise _with_remedy(error) from None
    if len(index) != shard.samples:
        raise DamageError(
            f"the tar holds {len(index)} samples, and the manifest says {shard.samples}", where=shard.path, fix=REMEDY
        )
    return index


def _with_remedy(error: DamageError) -> DamageError:
    return DamageError(error.what, where=error.where, fix=REMEDY)
