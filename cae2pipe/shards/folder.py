"""Folders as a source: class/**/*.jpg, or *.jpg without classes, on a disk or behind a URL."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cae2pipe.artifacts.places import file_sizes, is_local
from cae2pipe.errors import SourceError
from cae2pipe.names import why_not_utf8
from cae2pipe.shards.entries import SPLITS, SUFFIXES, Found, Source, is_image, is_utf8, labelled, make_source

FIX_SOURCE = "give a folder of images (class/*.jpg, or *.jpg), a .tar, a folder of .tar, or a .txt list of paths"


def scan_folder(root: Path) -> Source:
    """The images of ``root``: ``class/**/*.jpg``, or ``*.jpg`` without classes. Hidden files are passed over.

    Raises:
        SourceError: no such folder, no images, a class without images, images both beside and in folders, two files
            with one key, several splits, a name that is not UTF-8, or something that cannot be read.
    """
    refuse_no_folder(root)
    files = list_files(root)
    if splits := folder_splits(root, files):
        example = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise SourceError(
            f"this folder holds the splits {', '.join(splits)}, not classes",
            where=root,
            fix=f"give one of them, e.g. {root / example}",
        )
    images = [path for path in files if is_image(path)]
    if not images:
        raise SourceError(
            f"no images here: {_kinds(sorted(files))}" if files else "this folder is empty",
            where=root,
            fix=f"give a folder of images ({', '.join(sorted(s[1:] for s in SUFFIXES))})",
        )
    folders = subfolders(root, files)
    counts = Counter(path.split("/", 1)[0] for path in images if "/" in path)
    beside = sorted(path for path in images if "/" not in path)
    if beside and counts:
        raise SourceError(
            f"images lie both beside the class folders ({beside[0]}) and in them ({min(counts)}/)",
            where=root,
            fix="move them into a class folder, or give a folder of one kind",
        )
    if empty := [name for name in folders if not counts[name]]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise SourceError(
            f"a class folder holds no images{more}", where=root / empty[0], fix="remove the folder, or add images"
        )
    labels = labelled(folders)
    found = (
        Found(path, labels[path.split("/", 1)[0]] if labels else -1, file_bytes(root / path) if size is None else size)
        for path, size in sorted(files.items())
        if is_image(path)
    )
    return make_source(root, folders, found)


def folder_splits(root: Path, files: dict[str, int | None]) -> list[str]:
    """The splits of a folder ``split/class/*.jpg``, ``split/*.jpg`` or ``split/*.tar``, sorted; [] for any other.

    Splits bear one of the names ``SPLITS``, and nothing beside them holds images: ``train``, ``car`` and ``plane``
    are classes.
    """
    usable = [path for path in files if is_image(path) or path.endswith(".tar")]
    holding = {path.split("/", 1)[0] for path in usable if "/" in path}
    splits = [
        name
        for name in subfolders(root, files)
        if name.lower() in SPLITS
        and (name in holding or (is_local(root) and any(map(_is_folder, _visible(root / name)))))
    ]
    return [] if any("/" not in path for path in usable) or holding - set(splits) else splits


def subfolders(root: Path, files: dict[str, int | None]) -> list[str]:
    """The folders in ``root``, sorted. Object stores know none that are empty."""
    if is_local(root):
        return sorted(entry.name for entry in _visible(root) if _is_folder(entry))
    return sorted({path.split("/", 1)[0] for path in files if "/" in path})


def list_files(root: Path) -> dict[str, int | None]:
    """All files below ``root`` that are not hidden, by POSIX path; with their bytes where the listing says them."""
    if is_local(root):
        return dict.fromkeys(_walk(root))
    sizes = file_sizes(root)
    return {path: size for path, size in sizes.items() if not any(part.startswith(".") for part in path.split("/"))}


def refuse_no_folder(root: Path) -> None:
    """Raise SourceError where a local folder is not there."""
    if is_local(root) and not root.is_dir():
        raise SourceError("no such file or folder", where=root, fix=FIX_SOURCE)


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
            if not is_utf8(path):
                what, fix = why_not_utf8(path)
                raise SourceError(what, where=root, fix=fix)
            if _is_folder(entry):
                pending.append((path + "/", above))
            else:
                yield path


def file_bytes(path: Path) -> int:
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
