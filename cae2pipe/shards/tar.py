"""WebDataset tars: written so that equal samples give equal bytes, read in ranges.

A sample is two members: ``KEY.cls``, its label in digits, and ``KEY.jpg``, the image's bytes, whatever its format.
Members' names are compared and never used as paths.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.artifacts import storage
from cae2pipe.artifacts.storage import file_size
from cae2pipe.errors import DamageError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.shards.tar_members import TarFormatError, blocks, read_members

IMAGE, LABEL = "jpg", "cls"


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar: its key, its label, and the position of its image's bytes."""

    key: str
    label: int
    offset: int
    size: int


def write_samples(path: Path, samples: Iterable[tuple[str, int, bytes]]) -> None:
    """Write (key, label, image bytes) in order. The file depends on nothing else."""
    # webdataset imports torch, which takes seconds that readers of tars need not spend.
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for key, label, data in samples:
            writer.write({"__key__": key, LABEL: str(label).encode(), IMAGE: data})


def index_tar(path: Path) -> list[TarSample]:
    """The samples of a tar, from its headers.

    Raises:
        DamageError: not a tar, a truncated or damaged one, or members that are not pairs of image and label.
    """
    samples: dict[str, TarSample] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        size = file_size(path)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with path.open("rb") as file:
            for member, offset, archive in read_members(file, 0, size):
                key, _, kind = member.name.partition(".")
                end = offset + blocks(member.size)
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DamageError(f"member {member.name!r} of the tar is not a plain file", where=path)
                if archive:
                    raise DamageError(f"another archive follows in the tar, with {member.name!r}", where=path)
                if kind == IMAGE and key not in samples:
                    samples[key] = TarSample(key, labels.get(key, -1), offset, member.size)
                elif kind == LABEL and key not in labels and member.size <= 12:
                    labels[key] = int(read_tar_range(path, offset, member.size))
                else:
                    raise DamageError(f"the tar holds an unexpected member {member.name!r}", where=path)
    except TarFormatError as error:
        raise DamageError(error.what, where=path) from None
    except (OSError, ValueError) as error:
        reraise_exhaustion(error)
        raise DamageError(f"this tar cannot be read: {error}", where=path) from None
    read_tar_range(path, end, 2 * tarfile.BLOCKSIZE)  # a tar may be truncated between two members
    if unpaired := samples.keys() ^ labels.keys():
        raise DamageError(f"sample {min(unpaired)!r} lacks its image or its label", where=path)
    return [TarSample(key, labels[key], sample.offset, sample.size) for key, sample in samples.items()]


def read_tar_range(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on. Raises DamageError if the file ends before that."""
    try:
        data = storage.read_range(path, offset, size)
    except OSError as error:
        reraise_exhaustion(error)
        raise DamageError(f"this tar cannot be read: {error.strerror}", where=path) from None
    if len(data) != size:
        raise DamageError(f"the tar ends {size - len(data)} bytes too early", where=path)
    return data
