"""Folders as a source: class/**/*.jpg, or *.jpg without classes, on a disk or behind a URL."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from cae2pipe.artifacts.storage import file_sizes, is_local, read_range
from cae2pipe.errors import SourceError
from cae2pipe.runtime.foreign_names import why_not_utf8
from cae2pipe.shards.entries import SPLITS, Found, Source, is_utf8, labelled, make_source
from cae2pipe.shards.kinds import (
    HEAD,
    SUFFIXES,
    begins_as_image,
    describe_kinds,
    is_image,
    is_tar,
    kind,
    may_be_image,
)

FIX_SOURCE = "give a folder of images (class/*.jpg, or *.jpg), a .tar, a folder of .tar, or a .txt list of paths"


def scan_folder(root: Path, files: dict[str, int | None], images: Collection[str], *, hidden: int = 0) -> Source:
    """The images of ``root``: ``class/**/*.jpg``, or ``*.jpg`` without classes.

    Args:
        root: the folder. files: ``list_files`` of it. images: those of them that are images (``find_images``).
            hidden: number of hidden files and folders.

    Raises:
        SourceError: no images, a class without images, images both outside of class folders and in them, two files with
            the same key, several splits, labels that only tars may have, or something unreadable.
    """
    if splits := folder_splits(root, files):
        example = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise SourceError(
            f"this folder holds the splits {', '.join(splits)}, not classes",
            where=root,
            fix=f"give one of them, e.g. {root / example}",
        )
    if not files and not is_local(root):
        # Object stores have no empty folders, and some file systems say the same if their server does not answer.
        raise SourceError("nothing is there, or its server does not answer", where=root, fix="check the URL")
    if not images:
        raise SourceError(
            f"no images here: {describe_kinds(map(kind, sorted(files)))}" if files else "this folder is empty",
            where=root,
            fix=f"give a folder of images ({', '.join(sorted(s[1:] for s in SUFFIXES))})",
        )
    if tars := sorted(filter(is_tar, files)):
        raise SourceError(
            f"this folder holds both tars ({tars[0]}) and images ({min(images)})",
            where=root,
            fix="move the tars or the images to another folder",
        )
    folders = subfolders(root, files)
    counts = Counter(path.split("/", 1)[0] for path in images if "/" in path)
    beside = sorted(path for path in images if "/" not in path)
    if beside and counts:
        raise SourceError(
            f"there are images both outside of class folders ({beside[0]}) and in them ({min(counts)}/)",
            where=root,
            fix="move all images into class folders, or none",
        )
    if empty := [name for name in folders if not counts[name]]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        held = sorted(path for path in files if path.startswith(f"{empty[0]}/"))
        raise SourceError(
            f"a class folder holds no images{more}{': ' if held else ''}{describe_kinds(map(kind, held))}",
            where=root / empty[0],
            fix="remove the folder, or add images",
        )
    if not folders and (texts := sorted(path for path in files if kind(path) == ".cls")):
        raise SourceError(
            f"there are label files next to these images ({texts[0]}), which are only read from WebDataset tars",
            where=root,
            fix="pack the folder: tar -cf images.tar --sort=name FOLDER; or move the labels to another folder",
        )
    labels = labelled(folders)
    listed = []
    passed_over = Counter({"hidden": hidden} if hidden else {})
    for path, size in sorted(files.items()):
        if path in images:
            label = labels[path.split("/", 1)[0]] if labels else -1
            listed.append(Found(path, label, file_bytes(root / path) if size is None else size))
        else:
            passed_over[kind(path)] += 1
    return make_source(root, folders, listed, passed_over=passed_over)


def find_images(root: Path, files: Collection[str]) -> frozenset[str]:
    """Those of the files that are images, by their suffix or, if that is unknown, by their first bytes."""
    return frozenset(
        path for path in files if is_image(path) or (may_be_image(path) and begins_as_image(_read_head(root / path)))
    )


def _read_head(path: Path) -> bytes:
    if not is_local(path):
        return read_range(path, 0, HEAD)
    try:
        # Do not wait for a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(descriptor, HEAD) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def folder_splits(root: Path, files: dict[str, int | None]) -> list[str]:
    """The splits of a folder ``split/class/*.jpg``, ``split/*.jpg`` or ``split/*.tar``, sorted; [] for any other.

    Splits have a name from ``SPLITS``, and no other folder holds images: ``train``, ``car`` and ``plane``
    are classes.
    """
    usable = [path for path in files if is_image(path) or is_tar(path)]
    holding = {path.split("/", 1)[0] for path in usable if "/" in path}
    splits = [
        name
        for name in subfolders(root, files)
        if name.lower() in SPLITS
        and (name in holding or (is_local(root) and any(map(_is_folder, _visible(root / name)))))
    ]
    return [] if any("/" not in path for path in usable) or holding - set(splits) else splits


def subfolders(root: Path, files: dict[str, int | None]) -> list[str]:
    """The folders in ``root``, sorted. Object stores have no empty folders."""
    if is_local(root):
        return sorted(entry.name for entry in _visible(root) if _is_folder(entry))
    return sorted({path.split("/", 1)[0] for path in files if "/" in path})


def list_files(root: Path) -> tuple[dict[str, int | None], int]:
    """All files below ``root`` that are not hidden, by POSIX path, with their size if the listing has it.

    Also returns the number of hidden files and folders.
    """
    if is_local(root):
        paths = list(_walk(root))
        files: dict[str, int | None] = {path: None for path in paths if not _is_hidden(path)}
        return files, len(paths) - len(files)
    sizes = file_sizes(root)
    files = {path: size for path, size in sizes.items() if not any(map(_is_hidden, path.split("/")))}
    return files, len(sizes) - len(files)


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def refuse_no_folder(root: Path) -> None:
    """Raise SourceError if a local folder does not exist."""
    if is_local(root) and not root.is_dir():
        raise SourceError("no such file or folder", where=root, fix=FIX_SOURCE)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries without hidden files and folders."""
    return [entry for entry in _listed(folder) if not _is_hidden(entry.name)]


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise SourceError(
            f"this folder cannot be read: {error.strerror}", where=folder, fix="fix its permissions, or remove it"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(root: Path) -> Iterator[str]:
    """POSIX paths, relative to ``root``, of all files below it, and of hidden folders. Links are followed."""
    # Each folder with its ancestors as (device, inode): a link to one of them would be an endless loop.
    pending = [("", frozenset[tuple[int, int]]())]
    while pending:
        base, above = pending.pop()
        status = (root / base).stat()
        if (status.st_dev, status.st_ino) in above:
            raise SourceError(
                "this link points to a folder that contains it",
                where=root / base,
                fix="remove the link, then run the same command again",
            )
        above |= {(status.st_dev, status.st_ino)}
        for entry in _listed(root / base):
            path = base + entry.name
            if not is_utf8(path):
                what, fix = why_not_utf8(path)
                raise SourceError(what, where=root, fix=fix)
            if _is_folder(entry) and not _is_hidden(path):
                pending.append((path + "/", above))
            else:
                yield path


def file_bytes(path: Path) -> int:
    """The size of a file, or of a link's target."""
    try:
        status = path.stat()
    except OSError as error:
        what = (
            "the target of this link does not exist"
            if path.is_symlink()
            else f"this file cannot be read: {error.strerror}"
        )
        raise SourceError(what, where=path, fix="repair or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError("this has the name of an image or archive but is not a file", where=path, fix="remove it")
    return status.st_size
