"""Folders of images as a source: what is there, under which keys and labels."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.errors import SourceError
from cae2pipe.shards.keys import sample_key

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "training", "val", "valid", "validation", "test")
"""Names of sub-folders that are taken for splits, in any case, where they hold class folders."""


@dataclass(frozen=True)
class Entry:
    """One image file. ``path`` is POSIX and relative to the source; ``label`` points into the classes, -1: none."""

    path: str
    key: str
    label: int
    bytes: int


@dataclass(frozen=True)
class Source:
    """A scanned folder: its classes, sorted, and its images, sorted by path."""

    root: Path
    classes: list[str]
    entries: list[Entry]


def scan(root: Path) -> Source:
    """The images of ``root``: ``class/**/*.jpg``, or ``*.jpg`` without classes. Hidden files are passed over.

    Raises:
        SourceError: no such folder, no images, a class without images, images both beside and in folders, two files
            with one key, or several splits.
    """
    if not root.is_dir():
        what = "this is a file, and a folder of images is needed" if root.is_file() else "no such folder"
        raise SourceError(what, where=root, fix="give a folder of images: class/*.jpg, or *.jpg")
    if splits := find_splits(root):
        raise SourceError(
            f"this folder holds the splits {', '.join(splits)}, not classes",
            where=root,
            fix=f"give one of them, e.g. {root / splits[0]}",
        )
    files = sorted(_walk(root))
    images = [path for path in files if Path(path).suffix.lower() in SUFFIXES]
    if not images:
        raise SourceError(
            f"no images here: {_kinds(files)}" if files else "this folder is empty",
            where=root,
            fix=f"give a folder of images ({', '.join(sorted(s[1:] for s in SUFFIXES))})",
        )
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    beside = [path for path in images if "/" not in path]
    if classes and beside:
        raise SourceError(
            f"images lie both beside the class folders ({beside[0]}) and in them ({classes[0]}/)",
            where=root,
            fix="move them into a class folder, or give a folder of one kind",
        )
    counts = Counter(path.split("/", 1)[0] for path in images if "/" in path)
    if empty := [name for name in classes if not counts[name]]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise SourceError(
            f"a class folder holds no images{more}", where=root / empty[0], fix="remove the folder, or fill it"
        )
    labels = {name: label for label, name in enumerate(classes)}
    entries, owners = [], dict[str, str]()
    for path in images:
        key = sample_key(path.rpartition(".")[0])
        if key in owners:
            raise SourceError(
                f"two files would have the key {key!r}: {owners[key]} and {path}",
                where=root,
                fix="rename one of them; a key is the path without its suffix",
            )
        owners[key] = path
        label = labels[path.split("/", 1)[0]] if classes else -1
        entries.append(Entry(path, key, label, (root / path).stat().st_size))
    return Source(root, classes, entries)


def find_splits(root: Path) -> list[str]:
    """The splits of a folder ``split/class/*.jpg``; [] unless all sub-folders are named like splits and hold folders."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    are_splits = folders and all(
        path.name.lower() in SPLITS and any(child.is_dir() for child in path.iterdir()) for path in folders
    )
    return [path.name for path in folders] if are_splits else []


def _walk(root: Path) -> list[str]:
    """POSIX paths, relative to ``root``, of all files below it that are not hidden."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(folder).relative_to(root)
        found += [(base / name).as_posix() for name in names if not name.startswith(".")]
    return found


def _kinds(files: list[str]) -> str:
    kinds = Counter(Path(path).suffix.lower() or "suffixless" for path in files)
    return ", ".join(f"{count} {kind} files" for kind, count in kinds.most_common(3))
