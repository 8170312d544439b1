"""Ground truth for images without class folders: ImageNet's validation set.

Three forms are read: ImageNet's development kit (``ILSVRC2012_devkit_t12.tar.gz``, or its folder), a text file with
one class per line in the order of the images' names, and Kaggle's ``LOC_val_solution.csv``.
"""

from __future__ import annotations

import csv
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.artifacts.storage import file_size, is_local, read_bytes
from cae2pipe.errors import SourceError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.entries import Found, Source, labelled, make_source
from cae2pipe.shards.kinds import is_tar, stem
from cae2pipe.shards.name_lists import listed_names
from cae2pipe.shards.tar_members import TarFormatError, read_members

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"

LARGEST = 2**28
"""Largest unpacked development kit in bytes. ImageNet's has 7 million."""

FIX_LABELS = f"give {DEVKIT}, a text file with one class per line, or Kaggle's LOC_val_solution.csv"


@dataclass(frozen=True)
class GroundTruth:
    """All classes, sorted, and the class of each image, by its name without suffix or in the order of names."""

    path: Path
    classes: list[str]
    by_name: dict[str, str] | None = None
    in_order: list[str] | None = None


def with_ground_truth(source: Source, truth: GroundTruth) -> Source:
    """The source with its images as if in class folders, so that archives and unpacked folders give the same tars.

    Raises:
        SourceError: the source already has classes, an image has no label, or the number of images does not match.
    """
    if source.classes:
        raise SourceError(
            f"these images already have classes, e.g. {source.classes[0]!r}",
            where=source.root,
            fix="omit --labels",
        )
    images = sorted(source.entries, key=lambda entry: _name(entry.path))
    if truth.in_order is not None:
        if len(truth.in_order) != len(images):
            raise SourceError(
                f"this file has {counted(len(truth.in_order), 'label')}, but the source has "
                f"{counted(len(images), 'image')}",
                where=truth.path,
                fix="give all images of the file (ImageNet's validation set: 50000)",
            )
        names = truth.in_order
    else:
        assert truth.by_name is not None
        if missing := [entry.path for entry in images if _name(entry.path) not in truth.by_name]:
            raise SourceError(
                f"this file has no label for {counted(len(missing), 'image')}, e.g. {missing[0]}",
                where=truth.path,
                fix=FIX_LABELS,
            )
        names = [truth.by_name[_name(entry.path)] for entry in images]
    labels = labelled(truth.classes)
    labelled_images = []
    for entry, name in zip(images, names, strict=True):
        path = f"{name}/{entry.path.rpartition('/')[2]}"
        labelled_images.append(
            Found(path, labels[name], entry.bytes, entry.file or source.root / entry.path, entry.offset)
        )
    return make_source(source.root, truth.classes, labelled_images, passed_over=source.passed_over, notes=source.notes)


def read_ground_truth(path: Path) -> GroundTruth:
    """Read a ground-truth file of any of the three forms.

    Raises:
        SourceError: it is missing, or has none of these forms.
    """
    if is_local(path) and path.is_dir():
        folder = path / "data" if (path / "data").is_dir() else path
        return _devkit(path, {name: _read(folder / name) for name in (META, TRUTH)})
    data = _read(path)
    if data[:2] == b"\x1f\x8b" or is_tar(path.name):
        return _devkit(path, _members(path, data))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError("this is not a label file", where=path, fix=FIX_LABELS) from None
    if text.startswith("ImageId,"):
        try:
            rows = [row for row in csv.reader(io.StringIO(text)) if row][1:]
        except csv.Error as error:
            raise SourceError(f"this is not a CSV table: {error}", where=path, fix=FIX_LABELS) from None
        if bad := next((row for row in rows if len(row) < 2 or not row[1].split()), None):
            raise SourceError(f"this line has no class: {bad}", where=path, fix=FIX_LABELS)
        by_name: dict[str, str] = {}
        for row in rows:
            image, name = row[0].removesuffix(".JPEG"), row[1].split()[0]
            if by_name.setdefault(image, name) != name:
                raise SourceError(
                    f"image {image!r} has two classes, {by_name[image]} and {name}", where=path, fix=FIX_LABELS
                )
        return GroundTruth(path, sorted(set(by_name.values())), by_name=by_name)
    names = listed_names(text, path)
    if names and all(name.isdigit() for name in names):
        raise SourceError(
            "this file holds ImageNet's class numbers, whose names are only in the development kit",
            where=path,
            fix=f"give {DEVKIT}, which holds this file and the names",
        )
    if not names:
        raise SourceError("this file is empty", where=path, fix=FIX_LABELS)
    return GroundTruth(path, sorted(set(names)), in_order=names)


def _devkit(path: Path, files: dict[str, bytes]) -> GroundTruth:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise SourceError(
            "scipy is needed to read ImageNet's development kit",
            where=path,
            fix="pip install 'cae2pipe[imagenet]', or give a text file with one synset per line",
        ) from None
    try:
        synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"]
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        truth = [leaves[int(line)] for line in files[TRUTH].split()]
    except Exception as error:  # scipy raises its own errors and zlib's
        reraise_exhaustion(error)
        raise SourceError(f"this development kit cannot be read: {error}", where=path, fix=FIX_LABELS) from None
    return GroundTruth(path, sorted(leaves.values()), in_order=truth)


def _members(path: Path, data: bytes) -> dict[str, bytes]:
    """The two needed files of a development kit's archive."""
    members = {}
    try:
        if data[:2] == b"\x1f\x8b":
            data = zlib.decompressobj(wbits=31).decompress(data, LARGEST)
        for info, offset, _ in read_members(io.BytesIO(data), 0, len(data)):
            name = info.name.rpartition("/")[2]
            if name in (META, TRUTH) and info.isreg():
                members[name] = data[offset : offset + info.size]
    except (TarFormatError, zlib.error) as error:
        raise SourceError(f"this archive cannot be read: {error}", where=path, fix=FIX_LABELS) from None
    if missing := {META, TRUTH} - members.keys():
        raise SourceError(f"this archive does not contain {min(missing)}", where=path, fix=FIX_LABELS)
    return members


def _read(path: Path) -> bytes:
    if file_size(path) is None:
        raise SourceError("no such file", where=path, fix=FIX_LABELS)
    return read_bytes(path)


def _name(path: str) -> str:
    return stem(path.rpartition("/")[2])
