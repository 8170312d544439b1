"""A source in any form: its classes, and its images with their keys, labels and locations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cae2pipe.errors import SourceError
from cae2pipe.shards.checking import FileSlice
from cae2pipe.shards.keys import sample_key
from cae2pipe.shards.kinds import describe_kinds, stem

SPLITS = ("train", "training", "val", "valid", "validation", "test")
"""Names of subfolders that count as splits, in upper or lower case."""


class Found(NamedTuple):
    """An image found by a scan. ``path`` is POSIX and relative to the source; ``label`` is an index into its classes.

    ``file`` holds the image at ``offset``; None: the image is the file ``path`` itself.
    """

    path: str
    label: int
    bytes: int
    file: Path | None = None
    offset: int = 0


class Entry(NamedTuple):
    """An image of a source, with its key. ``label`` -1: none."""

    path: str
    key: str
    label: int
    bytes: int
    file: Path | None = None
    offset: int = 0


@dataclass(frozen=True)
class Source:
    """A scanned source: the names of its labels, and its images, sorted by path.

    ``passed_over`` counts skipped files, which are not images, by their kind; ``notes`` are lines for the user.
    """

    root: Path
    classes: list[str]
    entries: list[Entry]
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()

    def piece(self, entry: Entry) -> FileSlice:
        """Where to read the image's bytes."""
        return FileSlice(
            entry.file or self.root / entry.path, entry.offset, entry.bytes, entry.path if entry.offset else ""
        )

    def remarks(self) -> list[str]:
        """Lines to log: skipped files, and other remarks about the source."""
        count = self.passed_over.total()
        if not count:
            return list(self.notes)
        kinds = describe_kinds(self.passed_over, most=12)
        if count == 1:
            return [*self.notes, f"skipped 1 file that is not an image: {kinds}"]
        return [*self.notes, f"skipped {count} files that are not images: {kinds}"]


def make_source(
    root: Path,
    classes: list[str],
    images: Iterable[Found],
    *,
    passed_over: Counter[str] | None = None,
    notes: Iterable[str] = (),
) -> Source:
    """Sort by path, and give every image its key: its path without the suffix.

    Raises:
        SourceError: two images would have the same key.
    """
    entries, owners = [], dict[str, str]()
    for path, label, size, file, offset in sorted(images, key=lambda image: image.path):
        key = sample_key(stem(path))
        if key in owners:
            raise SourceError(
                f"this source holds {path} twice"
                if owners[key] == path
                else f"two files would have the same key {key!r}: {owners[key]} and {path}",
                where=root,
                fix="remove one of them"
                if owners[key] == path
                else "rename or remove one of them; a key is the path without its suffix",
            )
        owners[key] = path
        entries.append(Entry(path, key, label, size, file, offset))
    return Source(root, classes, entries, passed_over or Counter(), tuple(notes))


def is_utf8(name: str) -> bool:
    """Whether a name from a disk or an archive can be printed and stored."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def labelled(names: Iterable[str]) -> dict[str, int]:
    """Labels of class names: their indices in sorted order."""
    return {name: label for label, name in enumerate(sorted(set(names)))}
