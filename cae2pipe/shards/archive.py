"""Tars as a source, read where they lie: nothing is unpacked, an image is a range of bytes of its archive.

Four forms are told apart by what they hold:

- a tar of tars, one a class, named by it: ImageNet's ``ILSVRC2012_img_train.tar``, or a folder of such tars;
- a tar of class folders, ``class/*.jpg``, as ``tar`` makes of an image folder;
- a tar of images alone: ImageNet's ``ILSVRC2012_img_val.tar``, whose classes a ground-truth file tells;
- WebDataset tars, one or a folder of them: members that share their name up to the first dot are a sample, ``.cls`` is
  its label, and ``classes.txt`` beside the tars may name the labels.

Members' names are compared and become keys; they are never used as paths.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cae2pipe.artifacts.places import file_size, read_bytes
from cae2pipe.errors import SourceError
from cae2pipe.shards.entries import SPLITS, Found, Source, is_image, is_utf8, labelled, make_source

CLASSES = "classes.txt"
"""Names of the labels of WebDataset tars, a line each."""

FIX_ARCHIVE = "bring the archive again (compare its checksum with the one published), then run the same command"

_SYNSET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"\d{3}$")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, and where its bytes lie in the tar's file."""

    name: str
    offset: int
    bytes: int


@dataclass
class Contents:
    """What one tar holds: images, tars, and the ``.cls`` texts by sample name."""

    images: list[Member] = field(default_factory=list)
    tars: list[Member] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)


def scan_archive(path: Path) -> Source:
    """The images of one tar.

    Raises:
        SourceError: the tar is broken or cut off, or its form is none of those above.
    """
    contents = read_contents(path)
    if contents.tars:
        if contents.images:
            raise SourceError(
                f"this archive holds tars ({contents.tars[0].name}) beside images ({contents.images[0].name})",
                where=path,
                fix="give an archive of one kind",
            )
        return scan_class_tars(path, [(_stem(tar.name), path, read_contents(path, tar)) for tar in contents.tars])
    if not contents.images:
        raise SourceError("no images in this archive", where=path, fix="give an archive of images, or of tars of them")
    if contents.labels:
        return scan_samples(path, {_stem(path.name): (path, contents)})
    return scan_tree(path, contents.images)


def scan_tars(root: Path, names: list[str]) -> Source:
    """The images of a folder of tars: WebDataset's, or one tar a class.

    Raises:
        SourceError: as ``scan_archive``.
    """
    tars = [(_stem(name), root / name, read_contents(root / name)) for name in sorted(names)]
    # Tars of images alone: numbered ones are WebDataset's, without labels; others are named by their class.
    numbered = all(_NUMBERED.search(stem) and not _SYNSET.fullmatch(stem) for stem, *_ in tars)
    if numbered or any(contents.labels for *_, contents in tars):
        return scan_samples(root, {stem: (path, contents) for stem, path, contents in tars})
    return scan_class_tars(root, tars)


def scan_class_tars(root: Path, tars: Sequence[tuple[str, Path, Contents]]) -> Source:
    """Images of tars that are named by their class: (class, the file they lie in, what the tar holds)."""
    labels = labelled(name for name, *_ in tars)
    if len(labels) < len(tars):
        raise SourceError("two tars have one name, which would be their class", where=root, fix="rename one of them")
    found = []
    for name, path, contents in tars:
        if not contents.images:
            raise SourceError(f"the tar of class {name!r} holds no images", where=path, fix="remove it, or add images")
        found += [
            Found(f"{name}/{image.name}", labels[name], image.bytes, path, image.offset) for image in contents.images
        ]
    return make_source(root, sorted(labels), found)


def scan_tree(path: Path, images: list[Member]) -> Source:
    """Images in the folders of one tar, as if it were unpacked."""
    parts = [image.name.split("/") for image in images]
    # `tar` is often given the folder above: train/class/1.jpg, data/train/class/1.jpg.
    while len({names[0] for names in parts}) == 1 and min(map(len, parts)) > 1:
        if min(map(len, parts)) < 3 and parts[0][0].lower() not in SPLITS:
            break
        parts = [names[1:] for names in parts]
    tops = {names[0] for names in parts if len(names) > 1}
    if len(tops) > 1 and tops <= {name for name in tops if name.lower() in SPLITS}:
        raise SourceError(
            f"this archive holds the splits {', '.join(sorted(tops))}, not classes",
            where=path,
            fix="unpack it, and give the folder",
        )
    if tops and (beside := [names[0] for names in parts if len(names) == 1]):
        raise SourceError(
            f"images lie both beside the class folders ({min(beside)}) and in them ({min(tops)}/)",
            where=path,
            fix="give an archive of one kind",
        )
    labels = labelled(tops)
    found = [
        Found("/".join(names), labels.get(names[0], -1), image.bytes, path, image.offset)
        for names, image in zip(parts, images, strict=True)
    ]
    return make_source(path, sorted(tops), found)


def scan_samples(root: Path, tars: dict[str, tuple[Path, Contents]]) -> Source:
    """Images of WebDataset tars: keys are the tar's name and the sample's, since samples of two tars may share one."""
    found = []
    for stem, (path, contents) in tars.items():
        for image in contents.images:
            text = contents.labels.get(_sample(image.name))
            if text is None and contents.labels:
                raise SourceError(
                    f"sample {_sample(image.name)!r} has no .cls", where=path, fix="give all samples a label, or none"
                )
            if text is not None and not re.fullmatch(r"\d{1,9}", text):
                raise SourceError(
                    f"the .cls of sample {_sample(image.name)!r} is no label: {text[:20]!r}",
                    where=path,
                    fix="labels are numbers from 0 on; name them in a classes.txt beside the tars",
                )
            label = -1 if text is None else int(text)
            found.append(Found(f"{stem}/{image.name}", label, image.bytes, path, image.offset))
    kinds = {image.label >= 0 for image in found}
    if len(kinds) > 1:
        raise SourceError("some of these tars have labels, and some have none", where=root, fix="give tars of one kind")
    if not found:
        raise SourceError("no images in these tars", where=root, fix="give WebDataset tars of images")
    most = max(image.label for image in found) + 1
    return make_source(root, sample_classes(root, most), found)


def sample_classes(root: Path, count: int) -> list[str]:
    """The names of ``count`` labels from ``classes.txt`` beside the tars, or else their numbers.

    Raises:
        SourceError: it names fewer, or one twice.
    """
    path = (root.parent if root.name.endswith(".tar") else root) / CLASSES
    if not count or file_size(path) is None:
        return [str(label) for label in range(count)]
    names = [line.strip() for line in read_bytes(path).decode("utf-8", "replace").splitlines() if line.strip()]
    if len(names) < count or len(set(names)) < len(names):
        raise SourceError(
            f"this file names {len(set(names))} different labels in {len(names)} lines, and the tars use {count}",
            where=path,
            fix="one line a label, all different (ImageNet: synsets, since two classes are called crane)",
        )
    return names


def read_contents(path: Path, inner: Member | None = None) -> Contents:
    """What a tar holds, from its headers; ``inner``: of a tar that is a member of ``path``."""
    contents = Contents()
    with path.open("rb") as file:
        for member in walk(file, path, inner):
            sample, _, kind = _split(member.name)
            if is_image(member.name):
                contents.images.append(member)
            elif kind == "tar":
                contents.tars.append(member)
            elif kind == "cls" and member.bytes <= 64:
                file.seek(member.offset)
                contents.labels[sample] = file.read(member.bytes).decode("utf-8", "replace").strip()
    return contents


def walk(file: BinaryIO, path: Path, inner: Member | None = None) -> Iterator[Member]:
    """The plain files of a tar that are not hidden.

    Raises:
        SourceError: no tar, a compressed one, one that is cut off or broken, or links instead of files.
    """
    where = f"{path}, member {inner.name}" if inner else str(path)
    start = inner.offset if inner else 0
    end = start + inner.bytes if inner else (file_size(path) or 0)
    position = start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # a million of them would weigh a gigabyte
                position = info.offset_data + (-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE) * info.isreg()
                if info.offset_data + info.size * info.isreg() > end:
                    raise SourceError(f"the archive is cut off inside {info.name!r}", where=where, fix=FIX_ARCHIVE)
                if info.issym() or info.islnk():
                    raise SourceError(
                        f"{info.name!r} is a link, not a file", where=where, fix="pack the files: tar --dereference"
                    )
                name = PurePosixPath(info.name).as_posix()
                if not info.isreg() or any(part.startswith(".") and part != ".." for part in name.split("/")):
                    continue
                if info.issparse():
                    raise SourceError(f"{info.name!r} is stored as a sparse file", where=where, fix="pack it plainly")
                if not is_utf8(name):
                    raise SourceError(f"a name is not valid UTF-8: {name!r}", where=where, fix="rename it")
                yield Member(name, info.offset_data, info.size)
    except (tarfile.TarError, EOFError) as error:
        file.seek(start)
        packed = file.read(2) == b"\x1f\x8b"
        raise SourceError(
            "this archive is compressed" if packed else f"this archive cannot be read: {error}",
            where=where,
            fix="decompress it (gunzip): images are read from it by position" if packed else FIX_ARCHIVE,
        ) from None
    # Where a header is broken, tarfile takes that for the end and says nothing.
    file.seek(position)
    if any(file.read(min(2 * tarfile.BLOCKSIZE, max(0, end - position)))):
        raise SourceError(f"the archive is broken at byte {position}", where=where, fix=FIX_ARCHIVE)


def _split(name: str) -> tuple[str, str, str]:
    """A member's name at the first dot of its last part, as WebDataset splits it."""
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    return folder + slash + stem, dot, kind.lower()


def _sample(name: str) -> str:
    return _split(name)[0]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".tar")
