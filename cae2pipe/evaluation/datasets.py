"""Labelled data to score on: ``train`` and ``val``, each a folder of images or a shard set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import ShardsArtifact, is_artifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.errors import ImageError, ManifestError, SourceError
from cae2pipe.evaluation.crops import Crop
from cae2pipe.images.decode import decode_rgb
from cae2pipe.shards.checking import FileSlice, read_piece
from cae2pipe.shards.shard_set import KIND, ImageSample, ShardSet, read_image
from cae2pipe.shards.source import scan

TRAIN, VAL = ("train", "training"), ("val", "validation", "valid", "test")


class Samples(Protocol):
    """Random access to single images; picklable."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""

    def read(self, index: int) -> ImageSample:
        """One image. Raises SourceError or DamageError if its bytes cannot be read or have changed."""


@dataclass(frozen=True)
class Split:
    """One labelled part of the data. ``runs`` of up to ``batch`` images are read at once; ``samples`` gives single
    images.

    ``identity`` identifies the content: a folder's paths and sizes, for an archive or list also labels and classes, a
    shard set's digests and classes. ``remarks`` are lines to log about skipped files of a folder.
    """

    root: Path
    classes: list[str]
    runs: list[Callable[[], list[ImageSample]]]
    samples: Samples
    identity: str
    batch: int
    remarks: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        return len(self.samples.labels)


def open_data(root: Path, batch: int) -> tuple[Split, Split]:
    """``train`` and ``val`` below ``root``, in runs of up to ``batch`` images.

    Raises:
        SourceError: a part is missing or unlabelled, a class has fewer than two training images, or ``val`` has classes
            that ``train`` lacks. ManifestError: a shard set is not finished.
    """
    train, val = (open_split(find_part(root, names), batch) for names in (TRAIN, VAL))
    for split in (train, val):
        if not split.classes:
            raise SourceError("these images have no classes", where=split.root, fix="arrange them as train/CLASS/*.jpg")
    if len(train.classes) < 2:
        raise SourceError(
            f"there is only one class, {train.classes[0]!r}, so every score would be 100 %",
            where=train.root,
            fix="use one folder per class",
        )
    counts = np.bincount(train.samples.labels, minlength=len(train.classes))
    if few := [f"{name!r} ({count})" for name, count in zip(train.classes, counts.tolist(), strict=True) if count < 2]:
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        raise SourceError(
            f"classes with fewer than two training images: {', '.join(few[:3])}{more}",
            where=train.root,
            fix="add images, or remove the classes from train and val",
        )
    if unknown := sorted(set(val.classes) - set(train.classes)):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise SourceError(
            f"{val.root.name} has a class that is not in {train.root.name}: {unknown[0]!r}{more}",
            where=root,
            fix="use the same class folders in both; train must have all classes of val",
        )
    return train, val


def open_val(root: Path, batch: int) -> Split:
    """``val`` below ``root`` alone, in runs of up to ``batch`` images.

    Raises:
        SourceError: it is missing, or has fewer than two classes. ManifestError: a shard set is not finished.
    """
    val = open_split(find_part(root, VAL), batch)
    if len(val.classes) < 2:
        what = f"there is only one class, {val.classes[0]!r}" if val.classes else "these images have no classes"
        raise SourceError(what, where=val.root, fix="arrange them as val/CLASS/*.jpg")
    return val


def common_labels(labels: Tensor, own: list[str], common: list[str]) -> Tensor:
    """Labels int64 (N,), indices into ``own``, as indices into ``common``, which contains the same classes."""
    return torch.tensor([common.index(name) for name in own], dtype=torch.int64)[labels]


def find_part(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    what = f"there is no {names[0]!r} in this folder" if root.is_dir() else "no such folder"
    raise SourceError(what, where=root, fix="use a folder with train and val, each with CLASS/*.jpg, or a shard set")


def open_split(root: Path, batch: int) -> Split:
    """A folder of images or a shard set, in runs of up to ``batch`` images."""
    if is_artifact(root, KIND):
        return _open_shards(root, batch)
    source = scan(root)
    entries = source.entries
    runs = [
        _SourceRun(tuple((source.piece(entry), entry.path, entry.label) for entry in entries[low : low + batch]))
        for low in range(0, len(entries), batch)
    ]
    # In a folder the path determines the class.
    labels = any(entry.file for entry in entries)
    content = fingerprint(
        [[entry.path, entry.bytes, *([entry.label] if labels else [])] for entry in entries]
        + ([source.classes] if labels else [])
    )
    pieces = [(source.piece(entry), entry.path) for entry in entries]
    samples = _SourceSamples(pieces, np.array([entry.label for entry in entries], dtype=np.int64))
    return Split(root, source.classes, list(runs), samples, content, batch, tuple(source.remarks()))


def _open_shards(root: Path, batch: int) -> Split:
    if not ShardsArtifact.open(root).complete:
        raise ManifestError(
            "this shard set is not finished, so a score would cover only a part of it",
            where=root,
            fix="run `cae2pipe shard` with the same arguments as before",
        )
    shards = ShardSet.open(root)
    runs = [
        _ShardRun(shards, number, low, min(low + batch, shard.samples))
        for number, shard in enumerate(shards.shards)
        for low in range(0, shard.samples, batch)
    ]
    content = fingerprint([shards.classes, [shard.sha256 for shard in shards.shards]])
    return Split(root, shards.classes, list(runs), _ShardSamples.of(shards), content, batch)


@dataclass(frozen=True)
class _SourceRun:
    images: tuple[tuple[FileSlice, str, int], ...]

    def __call__(self) -> list[ImageSample]:
        return [ImageSample(path, label, read_piece(piece)) for piece, path, label in self.images]


@dataclass(frozen=True)
class _ShardRun:
    shards: ShardSet
    number: int
    low: int
    high: int

    def __call__(self) -> list[ImageSample]:
        shard = self.shards.shards[self.number]
        return self.shards.read(shard, self.low, self.high)


@dataclass(frozen=True)
class _SourceSamples:
    pieces: list[tuple[FileSlice, str]]
    labels: np.ndarray

    def read(self, index: int) -> ImageSample:
        piece, path = self.pieces[index]
        return ImageSample(path, int(self.labels[index]), read_piece(piece))


@dataclass(frozen=True)
class _ShardSamples:
    """Keeps a few numbers per image instead of the shards' indexes, which a shuffled epoch would read repeatedly."""

    shards: ShardSet
    labels: np.ndarray
    places: np.ndarray
    """Shard number, offset, size and CRC-32C of each image, int64 (N, 4)."""

    @classmethod
    def of(cls, shards: ShardSet) -> _ShardSamples:
        rows = [
            (sample.label, number, sample.offset, sample.size, sample.crc32c)
            for number, shard in enumerate(shards.shards)
            for sample in shards.index(shard)
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        return cls(shards, table[:, 0], table[:, 1:])

    def read(self, index: int) -> ImageSample:
        number, offset, size, checksum = self.places[index].tolist()
        path = self.shards.shards[number].path
        key = f"{path.name}+{offset}"
        return ImageSample(key, int(self.labels[index]), read_image(path, offset, size, crc32c=checksum))


@dataclass(frozen=True)
class Crops:
    """Crops of a run: pixels uint8 (b, S, S, 3), labels int64 (b,), keys, and the images that could not be decoded."""

    pixels: np.ndarray
    labels: np.ndarray
    keys: list[str]
    rejected: list[dict[str, Any]]


class CropReader:
    """Decodes and crops run by run; picklable for worker processes. Raises SourceError or DamageError if a run's files
    cannot be read.
    """

    def __init__(self, split: Split, runs: Sequence[int], crop: Crop):
        self.split, self.runs, self.crop = split, runs, crop

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Crops:
        pixels, labels, keys, rejected = [], [], [], []
        for sample in self.split.runs[self.runs[index]]():
            try:
                image = decode_rgb(sample.data, where=f"{self.split.root}, {sample.key}")
            except ImageError as error:
                rejected.append({"path": sample.key, "reason": error.what})
                continue
            pixels.append(self.crop(image, sample.key))
            labels.append(sample.label)
            keys.append(sample.key)
        side = self.crop.size
        stacked = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), dtype=np.uint8)
        return Crops(stacked, np.array(labels, dtype=np.int64), keys, rejected)
