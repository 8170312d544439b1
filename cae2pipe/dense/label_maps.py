"""Images with a label for every pixel: two folders with files of the same names, and a list of classes."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.config.dense import SegmentSettings
from cae2pipe.dense.orientation import is_upright, read_sides
from cae2pipe.dense.upernet import IGNORED
from cae2pipe.errors import ImageError, SettingsError, SourceError
from cae2pipe.images.decode import decode_rgb, describe_failure
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.kinds import SUFFIXES
from cae2pipe.shards.name_lists import listed_names, text_lines

IMAGES, ANNOTATIONS = "images", "annotations"
TRAIN, VAL = ("train", "training"), ("val", "validation")
CLASSES, ADE20K = "classes.txt", "objectInfo150.txt"


@dataclass(frozen=True)
class LabelledImages:
    """One part of the data: pairs of files, and the meaning of their labels. Picklable.

    Labels of classes start at ``first``; those in ``ignore`` do not count, nor does 0 if ``first`` is 1. ``upright``:
    for each pair, whether labels refer to the image as viewers show it, not as it is stored. ``notes``: log lines about
    files that are not read.
    """

    root: Path
    pairs: list[tuple[Path, Path]]
    upright: list[bool]
    classes: list[str]
    first: int
    ignore: tuple[int, ...]
    notes: list[str]
    identity: str

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """An image in RGB and its labels, uint8 (H, W): classes from 0, and ``IGNORED``.

        Raises:
            SourceError: a file cannot be read or decoded, sizes differ, or a label is not in the classes.
        """
        path, annotation = self.pairs[index]
        try:
            image = decode_rgb(path.read_bytes(), where=path, upright=self.upright[index])
            labels = read_labels(annotation)
        except OSError as error:
            raise SourceError(
                f"this file cannot be read: {error.strerror or error}", where=error.filename, fix="make it readable"
            ) from None
        except ImageError as error:
            raise SourceError(error.what, where=path, fix="replace the image, or remove it with its labels") from None
        if labels.shape != (image.height, image.width):
            raise SourceError(
                f"size mismatch: labels {labels.shape[1]} x {labels.shape[0]} pixels, image {image.width} x "
                f"{image.height}",
                where=annotation,
                fix="use labels of the image's size",
            )
        return image, mapped(labels, len(self.classes), self.first, ignore=self.ignore, where=annotation)


def read_labels(path: Path) -> np.ndarray:
    """A label map as stored, (H, W). Raises SourceError if the file is not one."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, labels = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's plugins raise many types
        reraise_exhaustion(error)
        raise SourceError(
            f"this label map cannot be decoded: {describe_failure(error)}", where=path, fix="replace it"
        ) from None
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        raise SourceError(
            f"a label map needs one integer per pixel, but this file's mode is {mode}",
            where=path,
            fix="use PNGs of mode L or P whose values are labels, not colours",
        )
    return labels


def mapped(labels: np.ndarray, classes: int, first: int, *, ignore: tuple[int, ...], where: Path) -> np.ndarray:
    """Labels for training: classes from 0, and ``IGNORED``. Raises SourceError if one is neither."""
    void = np.isin(labels, [*ignore, *range(first)])
    own = labels.astype(np.int64) - first
    wrong = ~void & ((own < 0) | (own >= classes))
    if wrong.any():
        values = ", ".join(map(str, np.unique(labels[wrong])[:5].tolist()))
        raise SourceError(
            f"label values [{values}] are outside {first}..{first + classes - 1} and not in `ignore`",
            where=where,
            fix=f"set classes, reduce_zero, or ignore: --set 'ignore=[{values}]'",
        )
    return np.where(void, IGNORED, own).astype(np.uint8)


def open_label_maps(root: Path, settings: SegmentSettings) -> tuple[LabelledImages, LabelledImages]:
    """Train and val of a folder with images/{train,val} and annotations/{train,val}.

    Raises:
        SourceError: a folder is missing or empty, or images have no labels. SettingsError: the classes are unknown.
    """
    names = class_names(root, settings)
    if len(names) > IGNORED:
        raise SettingsError(
            f"there are {len(names)} classes; at most {IGNORED} are supported", where="classes", fix="use fewer classes"
        )
    reduce_zero = settings.reduce_zero if settings.reduce_zero is not None else (root / ADE20K).is_file()
    train, val = (open_maps_part(root, part, names, first=int(reduce_zero), settings=settings) for part in (TRAIN, VAL))
    return train, val


def open_maps_part(
    root: Path, part: tuple[str, ...], names: list[str], *, first: int, settings: SegmentSettings
) -> LabelledImages:
    """One part, with size and orientation of every file checked."""
    pairs, notes, identity = _pairs(root, part)
    sides, sizes = (read_sides([pair[side] for pair in pairs]) for side in (0, 1))
    upright = [
        is_upright(one, labels.stored, settings.upright, where=pair[1], whose="the labels")
        for pair, one, labels in zip(pairs, sides, sizes, strict=True)
    ]
    return LabelledImages(root, pairs, upright, names, first, settings.ignore, notes, identity)


def class_names(root: Path, settings: SegmentSettings) -> list[str]:
    """Names of the classes: from classes.txt (one per line), from ADE20K's own table, or numbers."""
    if settings.classes is None and (root / CLASSES).is_file():
        names = listed_names((root / CLASSES).read_text(encoding="utf-8-sig"), root / CLASSES)
    elif settings.classes is None and (root / ADE20K).is_file():
        rows = text_lines((root / ADE20K).read_text(encoding="utf-8-sig"))[1:]
        names = [row.split("\t")[-1].strip() for row in rows if row.strip()]
    elif settings.classes is not None:
        return [str(number) for number in range(settings.classes)]
    else:
        raise SettingsError(
            f"the classes are unknown: there is no {CLASSES} and no {ADE20K}",
            where=root,
            fix=f"write {CLASSES} with one name per line in the order of the labels, or use --set classes=N",
        )
    if len(names) < 2 or len(set(names)) < len(names):
        raise SettingsError(
            f"{len(names)} classes are listed, {len(set(names))} of them different: at least two, each once, are "
            "needed",
            where=root / (CLASSES if (root / CLASSES).is_file() else ADE20K),
            fix="correct the list",
        )
    return names


def _pairs(root: Path, part: tuple[str, ...]) -> tuple[list[tuple[Path, Path]], list[str], str]:
    """Pairs of files, notes on unpaired files, and the fingerprint of names and sizes."""
    name = next((name for name in part if (root / IMAGES / name).is_dir()), None)
    if name is None or not (root / ANNOTATIONS / name).is_dir():
        missing = root / (IMAGES if name is None else ANNOTATIONS) / (name or part[0])
        raise SourceError(
            "no such folder",
            where=missing,
            fix="use a folder with images/train, images/val, annotations/train and annotations/val",
        )
    notes: list[str] = []
    images, annotations = (files_by_stem(root / kind / name, notes) for kind in (IMAGES, ANNOTATIONS))
    if not images:
        raise SourceError("there are no images here", where=root / IMAGES / name, fix="check the folder")
    if lone := sorted(images.keys() - annotations.keys()):
        more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
        raise SourceError(
            f"image {lone[0]!r}{more} has no labels",
            where=root / ANNOTATIONS / name,
            fix="add label maps of the same names, or remove the images",
        )
    if lone := sorted(annotations.keys() - images.keys()):
        notes.append(f"{root / ANNOTATIONS / name}: ignored {len(lone)} label maps without an image, e.g. {lone[0]!r}")
    pairs = [(path, annotations[key]) for key, path in images.items()]
    sizes = [[key, *(file.stat().st_size for file in (images[key], annotations[key]))] for key in images]
    return pairs, notes, fingerprint(sizes)


def files_by_stem(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Maps names without suffix to the images at any depth below a folder; other files are noted.

    Raises:
        SourceError: two names differ only in their suffix.
    """
    by_stem: dict[str, Path] = {}
    others = Counter[str]()
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in SUFFIXES:
            others[path.suffix or "without suffix"] += 1
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in by_stem:
            raise SourceError(
                f"two files are named {stem!r}: {by_stem[stem].name} and {path.name}", where=folder, fix="remove one"
            )
        by_stem[stem] = path
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        notes.append(f"{folder}: ignored {counted(others.total(), 'file')} without an image suffix ({kinds})")
    return by_stem
