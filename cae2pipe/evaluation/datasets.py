"""Labelled data to score on: ``train`` and ``val``, each a folder of images or a shard set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cae2pipe.artifacts.box import is_box
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.errors import ImageError, SourceError
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.evaluation_crop import evaluation_crop
from cae2pipe.shards.shard_set import KIND, ImageSample, ShardSet
from cae2pipe.shards.source import scan

TRAIN, VAL = ("train", "training"), ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class Split:
    """One labelled part of the data. ``runs`` are what is read at once; ``identity`` is a digest of the content."""

    root: Path
    classes: list[str]
    images: int
    runs: list[Callable[[], list[ImageSample]]]
    identity: str


def open_data(root: Path, batch: int) -> tuple[Split, Split]:
    """``train`` and ``val`` below ``root``, in runs of up to ``batch`` images.

    Raises:
        SourceError: a part is missing or unlabelled, or ``val`` has classes that ``train`` lacks.
    """
    train, val = (open_split(find_part(root, names), batch) for names in (TRAIN, VAL))
    for split in (train, val):
        if not split.classes:
            raise SourceError(
                "these images have no classes", where=split.root, fix="give folders of the form train/class/*.jpg"
            )
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise SourceError(
            f"train and val have different classes: {differing[0]!r} is in one of them only",
            where=root,
            fix="give both the same class folders",
        )
    return train, val


def find_part(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    what = f"there is no {names[0]!r} in this folder" if root.is_dir() else "no such folder"
    raise SourceError(
        what, where=root, fix="give a folder that holds train and val: folders class/*.jpg, or shard sets"
    )


def open_split(root: Path, batch: int) -> Split:
    """A folder of images or a shard set, in runs of up to ``batch`` images."""
    if is_box(root, KIND):
        return _open_shards(root, batch)
    source = scan(root)
    entries = source.entries
    runs = [
        _FolderRun(root, tuple((entry.path, entry.key, entry.label) for entry in entries[low : low + batch]))
        for low in range(0, len(entries), batch)
    ]
    content = fingerprint([[entry.path, entry.bytes] for entry in entries])
    return Split(root, source.classes, len(entries), list(runs), content)


def _open_shards(root: Path, batch: int) -> Split:
    shards = ShardSet.open(root)
    runs = [
        _ShardRun(shards, number, low, min(low + batch, shard.samples))
        for number, shard in enumerate(shards.shards)
        for low in range(0, shard.samples, batch)
    ]
    content = fingerprint([shard.sha256 for shard in shards.shards])
    return Split(root, shards.classes, shards.images, list(runs), content)


@dataclass(frozen=True)
class _FolderRun:
    root: Path
    entries: tuple[tuple[str, str, int], ...]

    def __call__(self) -> list[ImageSample]:
        return [ImageSample(path, label, (self.root / path).read_bytes()) for path, _, label in self.entries]


@dataclass(frozen=True)
class _ShardRun:
    shards: ShardSet
    number: int
    low: int
    high: int

    def __call__(self) -> list[ImageSample]:
        return self.shards.read(self.shards.shards[self.number], self.low, self.high)


@dataclass(frozen=True)
class Crops:
    """Central crops of a run: pixels uint8 (b, S, S, 3), labels int64 (b,), and what could not be decoded."""

    pixels: np.ndarray
    labels: np.ndarray
    rejected: list[dict[str, Any]]


class CropReader(Dataset):
    """Decodes and crops run by run; picklable, so that workers can hold it."""

    def __init__(self, split: Split, runs: range, size: int, resize: int):
        self.split, self.runs, self.size, self.resize = split, runs, size, resize

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Crops:
        pixels, labels, rejected = [], [], []
        for sample in self.split.runs[self.runs[index]]():
            try:
                image = decode_rgb(sample.data, where=f"{self.split.root}, {sample.key}")
            except ImageError as error:
                rejected.append({"path": sample.key, "reason": error.what})
                continue
            pixels.append(np.asarray(evaluation_crop(image, self.size, self.resize)))
            labels.append(sample.label)
        shape = (len(pixels), self.size, self.size, 3)
        stacked = np.stack(pixels) if pixels else np.zeros(shape, dtype=np.uint8)
        return Crops(stacked, np.array(labels, dtype=np.int64), rejected)
