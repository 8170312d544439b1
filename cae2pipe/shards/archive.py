"""Tars as a source, read in place: nothing is unpacked, an image is a range of bytes of its archive.

Four forms are distinguished by their contents:

- a tar of tars, one per class and named after it: ImageNet's ``ILSVRC2012_img_train.tar``, or a folder of such tars;
- a tar of class folders, ``class/*.jpg``, made from an image folder;
- a tar of only images: ImageNet's ``ILSVRC2012_img_val.tar``, whose classes are in a ground-truth file;
- WebDataset tars, one, a folder or a tar of them: ``.cls`` members are labels (``samples.py``).

Members' names are compared and become keys, but are never used as paths.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from cae2pipe.artifacts.storage import file_size, is_local
from cae2pipe.errors import SourceError
from cae2pipe.shards.entries import SPLITS, Found, Source, is_utf8, labelled, make_source
from cae2pipe.shards.folder import file_bytes
from cae2pipe.shards.kinds import (
    HEAD,
    begins_as_image,
    describe_kinds,
    is_image,
    is_tar,
    kind,
    may_be_image,
)
from cae2pipe.shards.samples import CLASSES, Contents, Member, Tar, scan_samples
from cae2pipe.shards.tar_members import BLOCK, TarFormatError, TarMember, blocks, read_members

FIX_ARCHIVE = (
    "download or copy the archive again (compare its checksum with the published one), then run the same command"
)

ARCHIVES = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z", ".rar")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
"""The first bytes of gzip, bzip2, xz, Zstandard and zip files."""

_SYNSET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"\d{3}$")


def scan_archive(path: Path) -> Source:
    """The images of one tar.

    Raises:
        SourceError: the tar is damaged or truncated, or has none of the forms above.
    """
    contents = read_contents(path)
    if not contents.tars:
        return scan_tar(path, contents)
    if contents.images or contents.labels:
        other = contents.images[0].name if contents.images else min(contents.labels.values()).name
        raise SourceError(
            f"this archive holds both tars ({contents.tars[0].name}) and images or labels ({other})",
            where=path,
            fix="give an archive with only one of them",
        )
    tars = [Tar(_stem(tar.name), path, read_contents(path, tar)) for tar in contents.tars]
    if any(tar.contents.labels for tar in tars):
        return scan_samples(path, tars, contents.passed_over)
    return scan_class_tars(path, tars, contents.passed_over)


def scan_tar(path: Path, contents: Contents) -> Source:
    """The images of one tar without tars in it."""
    if contents.labels:
        return scan_samples(path, [Tar(_stem(path.name), path, contents)])
    if not contents.images:
        kinds = f": {describe_kinds(contents.passed_over)}" if contents.passed_over else ""
        raise SourceError(
            f"no images in this archive{kinds}", where=path, fix="give an archive of images, or of tars of them"
        )
    return scan_tree(path, contents)


def scan_tars(root: Path, names: list[str], others: Sequence[str]) -> Source:
    """The images of a folder of tars: WebDataset's, or one tar per class.

    Args:
        names: of the tars in the folder. others: the other files in it.

    Raises:
        SourceError: as ``scan_archive``.
    """
    if archives := sorted(name for name in others if kind(name) in ARCHIVES):
        raise SourceError(
            f"besides tars this folder holds archives that cannot be read: {describe_kinds(map(kind, archives))}",
            where=root / archives[0],
            fix="decompress or unpack them, or move them to another folder",
        )
    tars = [Tar(_stem(name), root / name, read_contents(root / name)) for name in sorted(names)]
    passed_over = Counter(kind(name) for name in others if name != CLASSES)
    # Tars with only images: numbered ones are WebDataset's, without labels; others are named after their class.
    numbered = all(_NUMBERED.search(tar.name) and not _SYNSET.fullmatch(tar.name) for tar in tars)
    if numbered or any(tar.contents.labels for tar in tars):
        return scan_samples(root, tars, passed_over)
    if len(tars) == 1 and len(_top_folders(tars[0].contents)) > 1:
        source = scan_archive(tars[0].path)
        return replace(source, passed_over=source.passed_over + passed_over)
    return scan_class_tars(root, tars, passed_over)


def scan_class_tars(root: Path, tars: Sequence[Tar], passed_over: Counter[str] | None = None) -> Source:
    """Images of tars that are named after their class."""
    labels = labelled(tar.name for tar in tars)
    if len(labels) < len(tars):
        raise SourceError(
            "two tars have the same name, and therefore the same class", where=root, fix="rename one of them"
        )
    images, notes, passed_over = [], list[str](), Counter(passed_over or {})
    for name, path, contents in tars:
        contents.refuse_tars(path)
        if not contents.images:
            raise SourceError(f"the tar of class {name!r} holds no images", where=path, fix="remove it, or add images")
        if len(folders := _top_folders(contents)) > 1:
            raise SourceError(
                f"this tar would be the class {name!r}, but holds several folders: {folders[0]} and {folders[1]}",
                where=path,
                fix="unpack these tars into one folder, or merge them into one tar",
            )
        images += [
            Found(f"{name}/{image.name}", labels[name], image.bytes, path, image.offset) for image in contents.images
        ]
        passed_over += contents.passed_over
        notes += contents.notes
    return make_source(root, sorted(labels), images, passed_over=passed_over, notes=notes)


def scan_tree(path: Path, contents: Contents) -> Source:
    """Images in the folders of one tar, as if unpacked."""
    parts = [image.name.split("/") for image in contents.images]
    # Often the parent folder was packed: train/class/1.jpg, data/train/class/1.jpg.
    top, depth = 0, min(map(len, parts))
    while len({names[top] for names in parts}) == 1 and depth - top > 1:
        if depth - top < 3 and parts[0][top].lower() not in SPLITS:
            break
        top += 1
    parts = [names[top:] for names in parts]
    tops = {names[0] for names in parts if len(names) > 1}
    if len(tops) > 1 and tops <= {name for name in tops if name.lower() in SPLITS}:
        raise SourceError(
            f"this archive holds the splits {', '.join(sorted(tops))}, not classes",
            where=path,
            fix="unpack it and give the folder",
        )
    if tops and (beside := [names[0] for names in parts if len(names) == 1]):
        raise SourceError(
            f"there are images both outside of class folders ({min(beside)}) and in them ({min(tops)}/)",
            where=path,
            fix="give an archive with only one of them",
        )
    labels = labelled(tops)
    images = [
        Found("/".join(names), labels.get(names[0], -1), image.bytes, path, image.offset)
        for names, image in zip(parts, contents.images, strict=True)
    ]
    return make_source(path, sorted(tops), images, passed_over=contents.passed_over, notes=contents.notes)


def read_contents(path: Path, inner: Member | None = None) -> Contents:
    """The contents of a tar, from its headers; ``inner``: a tar that is a member of ``path``.

    Raises:
        SourceError: not a tar, a compressed, truncated or damaged one, or one with links instead of files.
    """
    where = f"{path}, member {inner.name}" if inner else str(path)
    start = inner.offset if inner else 0
    size = inner.bytes if inner else (file_bytes(path) if is_local(path) else file_size(path) or 0)
    contents = Contents()
    archives, end = 0, start
    with path.open("rb") as file:
        try:
            for member in read_members(file, start, size):
                archives, end = member.archive + 1, member.offset + blocks(member.info.size * member.info.isreg())
                name = _checked_name(member, where)
                if name is None:
                    if not member.info.isdir():
                        contents.passed_over["hidden" if member.info.isreg() else "special"] += 1
                    continue
                placed = Member(name, member.offset, member.info.size)
                if may_be_image(name):
                    file.seek(member.offset)
                    image = begins_as_image(file.read(min(HEAD, placed.bytes)))
                else:
                    image = is_image(name)
                if image:
                    contents.images.append(placed)
                elif is_tar(name):
                    contents.tars.append(placed)
                elif kind(name) == ".cls":
                    contents.add_label(placed, file, where)
                else:
                    contents.passed_over[kind(name)] += 1
        except TarFormatError as error:
            file.seek(start)
            packed = file.read(6)
            compressed = any(packed.startswith(magic) for magic in COMPRESSED)
            raise SourceError(
                "this archive is compressed" if compressed else error.what,
                where=where,
                fix="decompress it (e.g. gunzip): images are read from it by position"
                if compressed
                else error.fix or FIX_ARCHIVE,
            ) from None
    if archives > 1:
        contents.notes.append(f"{where} consists of {archives} concatenated archives: all are read")
    if start + size - end < 2 * BLOCK:
        contents.notes.append(f"{where} has no end mark: it may have been truncated between two files")
    return contents


def _checked_name(member: TarMember, where: str) -> str | None:
    """A plain file's relative POSIX name; None for folders, hidden files, and special files without an image name."""
    info = member.info
    if info.isdir():
        return None
    if info.issym() or info.islnk():
        raise SourceError(f"{info.name!r} is a link, not a file", where=where, fix="pack the files: tar --dereference")
    if info.type == b"M":
        raise SourceError(
            f"{info.name!r} continues a file of another volume",
            where=where,
            fix="join the volumes, or pack the files again",
        )
    # A leading slash is ignored, as when `tar` unpacks.
    name = PurePosixPath(info.name.lstrip("/")).as_posix()
    parts = name.split("/")
    if any(part.startswith(".") and part != ".." for part in parts):
        return None
    if not info.isreg():
        if is_image(name):
            raise SourceError(f"{name!r} has an image's name but is not a file", where=where, fix="pack without it")
        return None
    if ".." in parts:
        raise SourceError(
            f"the name {name!r} points outside of the archive", where=where, fix="pack files below one folder"
        )
    if not is_utf8(name):
        raise SourceError(f"a name is not valid UTF-8: {name!r}", where=where, fix="rename it")
    return name


def _top_folders(contents: Contents) -> list[str]:
    return sorted({image.name.split("/")[0] for image in contents.images if "/" in image.name})


def _stem(name: str) -> str:
    last = name.rpartition("/")[2]
    return last[: -len(".tar")] if is_tar(last) else last
