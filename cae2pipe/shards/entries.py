"""What a source is, whatever it lies in: its classes, and its images with their keys, labels and places."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cae2pipe.errors import SourceError
from cae2pipe.shards.checking import Piece
from cae2pipe.shards.keys import sample_key

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "training", "val", "valid", "validation", "test")
"""Names of sub-folders that are taken for splits, in any case."""


class Found(NamedTuple):
    """An image that a scan has met. ``path`` is POSIX and relative to the source; ``label`` points into its classes.

    ``file`` holds the image at ``offset``; None: the image is the file ``path`` itself.
    """

    path: str
    label: int
    bytes: int
    file: Path | None = None
    offset: int = 0


class Entry(NamedTuple):
    """An image of a source: what was found, under its key. ``label`` -1: none."""

    path: str
    key: str
    label: int
    bytes: int
    file: Path | None = None
    offset: int = 0


@dataclass(frozen=True)
class Source:
    """A scanned source: the names of its labels, and its images, sorted by path."""

    root: Path
    classes: list[str]
    entries: list[Entry]

    def piece(self, entry: Entry) -> Piece:
        """Where the image's bytes are to be read."""
        return Piece(
            entry.file or self.root / entry.path, entry.offset, entry.bytes, entry.path if entry.offset else ""
        )


def make_source(root: Path, classes: list[str], found: Iterable[Found]) -> Source:
    """Sort by path, and give every image its key: its path without the suffix.

    Raises:
        SourceError: two images would have one key.
    """
    entries, owners = [], dict[str, str]()
    for path, label, size, file, offset in sorted(found, key=lambda image: image.path):
        key = sample_key(path.rpartition(".")[0])
        if key in owners:
            raise SourceError(
                f"two files would have the key {key!r}: {owners[key]} and {path}",
                where=root,
                fix="rename one of them; a key is the path without its suffix",
            )
        owners[key] = path
        entries.append(Entry(path, key, label, size, file, offset))
    return Source(root, classes, entries)


def is_image(path: str) -> bool:
    """Whether a file's suffix is that of an image, in any case."""
    return os.path.splitext(path)[1].lower() in SUFFIXES  # noqa: PTH122 - a Path for each of a million names is slow


def is_utf8(name: str) -> bool:
    """Whether a name from a disk or an archive can be printed and written down."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def labelled(names: Iterable[str]) -> dict[str, int]:
    """Labels of class names: their places in sorted order."""
    return {name: label for label, name in enumerate(sorted(set(names)))}
