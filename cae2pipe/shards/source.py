"""Folders of images as a source: what is there, under which keys and labels."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.errors import SourceError
from cae2pipe.shards.keys import sample_key

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "training", "val", "valid", "validation", "test")
"""Names of sub-folders that are taken for splits, in any case."""

FIX_FOLDER = "give a folder of images: class/*.jpg, or *.jpg"


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
            with one key, several splits, a name that is not UTF-8, or something that cannot be read.
    """
    _refuse_no_folder(root)
    if splits := find_splits(root):
        example = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise SourceError(
            f"this folder holds the splits {', '.join(splits)}, not classes",
            where=root,
            fix=f"give one of them, e.g. {root / example}",
        )
    files = sorted(_walk(root))
    images = [path for path in files if is_image(path)]
    if not images:
        raise SourceError(
            f"no images here: {_kinds(files)}" if files else "this folder is empty",
            where=root,
            fix=f"give a folder of images ({', '.join(sorted(s[1:] for s in SUFFIXES))})",
        )
    classes = sorted(entry.name for entry in _visible(root) if _is_folder(entry))
    counts = Counter(path.split("/", 1)[0] for path in images if "/" in path)
    beside = [path for path in images if "/" not in path]
    if beside and counts:
        raise SourceError(
            f"images lie both beside the class folders ({beside[0]}) and in them ({min(counts)}/)",
            where=root,
            fix="move them into a class folder, or give a folder of one kind",
        )
    if empty := [name for name in classes if not counts[name]]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise SourceError(
            f"a class folder holds no images{more}", where=root / empty[0], fix="remove the folder, or add images"
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
        entries.append(Entry(path, key, label, _file_bytes(root / path)))
    return Source(root, classes, entries)


def find_splits(root: Path) -> list[str]:
    """The splits of a folder ``split/class/*.jpg`` or ``split/*.jpg``, sorted; [] for any other folder.

    Splits bear one of the names ``SPLITS``, and nothing beside them holds images: ``train``, ``car`` and ``plane``
    are classes.

    Raises:
        SourceError: no such folder, or one that cannot be read.
    """
    _refuse_no_folder(root)
    entries = _visible(root)
    if any(is_image(entry.name) for entry in entries if not _is_folder(entry)):
        return []
    folders = sorted(entry.name for entry in entries if _is_folder(entry))
    splits = [
        name
        for name in folders
        if name.lower() in SPLITS and any(_is_folder(child) or is_image(child.name) for child in _visible(root / name))
    ]
    others = (root / name for name in folders if name not in splits)
    return [] if splits and any(any(map(is_image, _walk(other))) for other in others) else splits


def is_image(path: str) -> bool:
    """Whether a file's suffix is that of an image, in any case."""
    return os.path.splitext(path)[1].lower() in SUFFIXES  # noqa: PTH122 - a Path for each of a million names is slow


def _refuse_no_folder(root: Path) -> None:
    if not root.is_dir():
        what = "this is a file, and a folder of images is needed" if root.exists() else "no such folder"
        raise SourceError(what, where=root, fix=FIX_FOLDER)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, but for hidden files and folders."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(
            f"this folder cannot be read: {error.strerror}", where=folder, fix="mend that, or remove the folder"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(root: Path) -> Iterator[str]:
    """POSIX paths, relative to ``root``, of all files below it that are not hidden. Links are followed."""
    # Each folder with those that lead to it, as (device, inode): a link to one of them would never end.
    pending = [("", frozenset[tuple[int, int]]())]
    while pending:
        base, above = pending.pop()
        status = (root / base).stat()
        if (status.st_dev, status.st_ino) in above:
            raise SourceError(
                "this link leads to a folder that holds it", where=root / base, fix="remove the link, then run again"
            )
        above |= {(status.st_dev, status.st_ino)}
        for entry in _visible(root / base):
            path = base + entry.name
            if not _is_utf8(path):
                raise SourceError(
                    f"a name is not valid UTF-8: {os.fsencode(path)!r}", where=root, fix="rename it, e.g. with convmv"
                )
            if _is_folder(entry):
                pending.append((path + "/", above))
            else:
                yield path


def _is_utf8(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _file_bytes(path: Path) -> int:
    """The size of a file, of a link's goal where it is one."""
    try:
        status = path.stat()
    except OSError as error:
        what = "this link leads nowhere" if path.is_symlink() else f"this file cannot be read: {error.strerror}"
        raise SourceError(what, where=path, fix="mend or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError("this bears an image's name and is not a file", where=path, fix="remove it")
    return status.st_size


def _kinds(files: list[str]) -> str:
    kinds = Counter(Path(path).suffix.lower() or "suffixless" for path in files)
    return ", ".join(f"{count} {kind} file{'s' * (count > 1)}" for kind, count in kinds.most_common(3))
