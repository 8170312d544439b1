"""WebDataset's tars: ``NAME.cls`` is the label of the image ``NAME.jpg``, and of ``NAME.ANYTHING.jpg`` without its
own label. Names may contain dots. ``classes.txt`` next to the tars may name the labels, one per line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cae2pipe.artifacts.storage import file_size, is_local, read_bytes
from cae2pipe.errors import SourceError
from cae2pipe.shards.entries import Found, Source, make_source
from cae2pipe.shards.kinds import is_tar, stem
from cae2pipe.shards.name_lists import listed_names

CLASSES = "classes.txt"
"""Names of the labels of WebDataset tars, one per line."""

MOST_LABELS = 100_000
"""Largest number of labels without ``classes.txt``. Each becomes a class of the manifest, with or without images."""

LONGEST_LABEL = 64


class Member(NamedTuple):
    """A file in a tar: its name, and the position of its bytes in the tar's file."""

    name: str
    offset: int
    bytes: int


class Label(NamedTuple):
    """A ``.cls`` member and its text."""

    name: str
    text: str


@dataclass
class Contents:
    """The contents of one tar: images, tars, labels by name without ``.cls``; other files by kind, and lines to log."""

    images: list[Member] = field(default_factory=list)
    tars: list[Member] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add_label(self, member: Member, file: BinaryIO, where: str) -> None:
        """Read a ``.cls``. Raises SourceError if it is too long for a label, or a duplicate."""
        name = member.name[: -len(".cls")]
        if name in self.labels:
            raise SourceError(
                f"this archive holds the label {member.name!r} twice",
                where=where,
                fix="pack the files again (tar -r adds a second copy)",
            )
        if member.bytes > LONGEST_LABEL:
            raise SourceError(
                f"{member.name} is not a label: it has {member.bytes} bytes",
                where=where,
                fix="labels are numbers starting at 0",
            )
        file.seek(member.offset)
        self.labels[name] = Label(member.name, file.read(member.bytes).decode("utf-8", "replace").strip())

    def refuse_tars(self, where: Path) -> None:
        """Raise SourceError if this tar, which is inside another or in a folder of tars, contains tars."""
        if self.tars:
            raise SourceError(f"this tar contains a tar: {self.tars[0].name}", where=where, fix="give tars of images")


class Tar(NamedTuple):
    """A tar of a source: its name without ``.tar``, the file that it is in, and its contents."""

    name: str
    path: Path
    contents: Contents


def scan_samples(root: Path, tars: Sequence[Tar], passed_over: Counter[str] | None = None) -> Source:
    """Images of WebDataset tars: a key is the tar's name and the sample's, which alone may not be unique.

    Raises:
        SourceError: a label without an image, an image without a label among labelled ones, a label that is not a
            number, or one that is too large.
    """
    if len({tar.name for tar in tars}) < len(tars):
        raise SourceError("two tars have the same name", where=root, fix="rename one of them")
    listed, notes, passed_over = [], list[str](), Counter(passed_over or {})
    for name, path, contents in tars:
        contents.refuse_tars(path)
        for image, label in zip(contents.images, paired(contents, path), strict=True):
            listed.append(Found(f"{name}/{image.name}", label, image.bytes, path, image.offset))
        passed_over += contents.passed_over
        notes += contents.notes
    kinds = {image.label >= 0 for image in listed}
    if len(kinds) > 1:
        raise SourceError(
            "some of these tars have labels, others have none",
            where=root,
            fix="give only tars with labels, or only tars without",
        )
    if not listed:
        raise SourceError("no images in these tars", where=root, fix="give WebDataset tars of images")
    if kinds == {False} and any("/" in image.name for tar in tars for image in tar.contents.images):
        notes.append("these tars hold no labels (.cls); folders in them are not used as classes")
    most = max(image.label for image in listed) + 1
    return make_source(root, sample_classes(root, most), listed, passed_over=passed_over, notes=notes)


def paired(contents: Contents, where: Path) -> list[int]:
    """The label of each image of a tar; -1 for all if it has no labels.

    An image's label is the one with the longest name that is a prefix of the image's name, ending before a dot.
    """
    if not contents.labels:
        return [-1] * len(contents.images)
    labels, used = [], set()
    for image in contents.images:
        name = stem(image.name)
        while name not in contents.labels and "." in name.rpartition("/")[2]:
            name = name.rpartition(".")[0]
        if name not in contents.labels:
            raise SourceError(f"{image.name!r} has no .cls", where=where, fix="label all samples, or none of them")
        label = contents.labels[name]
        if not re.fullmatch("[0-9]{1,9}", label.text):
            raise SourceError(
                f"{label.name!r} is not a label: {label.text[:20]!r}",
                where=where,
                fix=f"labels are numbers starting at 0; name them in a {CLASSES} next to the tars",
            )
        used.add(name)
        labels.append(int(label.text))
    if lost := [label.name for name, label in contents.labels.items() if name not in used]:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise SourceError(
            f"the label {lost[0]!r} belongs to no image{more}",
            where=where,
            fix="NAME.cls is the label of NAME.jpg or NAME.ANYTHING.jpg: rename it, or pack without it",
        )
    return labels


def sample_classes(root: Path, count: int) -> list[str]:
    """The names of ``count`` labels from ``classes.txt`` next to the tars, or else their numbers.

    Raises:
        SourceError: it names fewer labels, or one twice; or there is no such file, and there are too many labels.
    """
    path = (root.parent if is_tar(root.name) else root) / CLASSES
    if is_local(path) and path.exists() and not path.is_file():
        raise SourceError("this is not a file", where=path, fix="remove it, or list the labels' names, one per line")
    if not count or file_size(path) is None:
        if count > MOST_LABELS:
            raise SourceError(
                f"a .cls has the label {count - 1}, which is too large",
                where=root,
                fix=f"number labels from 0; to use more than {MOST_LABELS}, name them in a {CLASSES} next to the tars",
            )
        return [str(label) for label in range(count)]
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"this file is not UTF-8: {error}", where=path, fix="save it as UTF-8") from None
    names = listed_names(text, path)
    if len(names) < count or len(set(names)) < len(names):
        raise SourceError(
            f"this file names {len(set(names))} different labels in {len(names)} lines, but the tars use {count}",
            where=path,
            fix="write one line per label, all different (ImageNet: synsets, since two classes have the name crane)",
        )
    return names
