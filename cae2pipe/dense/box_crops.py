"""Training images with boxes and masks: flipped, cropped and resized as in DETR."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cae2pipe.config.dense import DetectSettings
from cae2pipe.dense.coco import CocoImages, Objects
from cae2pipe.dense.label_crops import fitted_size
from cae2pipe.runtime.seeded import seeded
from cae2pipe.supervised.schedule import Chunk, Reader, TrainSchedule

FIRST_SIDES = (400, 500, 600)
"""Short sides that an image is resized to before it is cropped (DETR)."""
DIVISOR = 32
"""Padded sides are multiples of this."""


@dataclass(frozen=True)
class BoxChunk(Chunk):
    """Images padded to a common size: pixels uint8 (c, 3, H, W), ``sizes`` without the padding, and their objects;
    labels int64 (c,) are image numbers."""

    sizes: tuple[tuple[int, int], ...] = ()
    targets: tuple[dict[str, Tensor], ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        targets = tuple({name: change(tensor) for name, tensor in target.items()} for target in self.targets)
        return replace(super().map(change), targets=targets)


def resized_objects(image: Image.Image, objects: Objects, size: tuple[int, int]) -> tuple[Image.Image, Objects]:
    """Both at another size, (width, height)."""
    x, y = size[0] / image.width, size[1] / image.height
    masks = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in objects.masks]
    stacked = np.stack(masks) if masks else np.zeros((0, size[1], size[0]), dtype=np.uint8)
    boxes = objects.boxes * np.array([x, y, x, y], dtype=np.float32)
    return image.resize(size, Image.Resampling.BILINEAR), Objects(boxes, objects.labels, stacked)


def flipped_objects(image: Image.Image, objects: Objects) -> tuple[Image.Image, Objects]:
    """Both mirrored."""
    x1, y1, x2, y2 = objects.boxes.T
    boxes = np.stack([image.width - x2, y1, image.width - x1, y2], axis=1)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return mirrored, Objects(boxes, objects.labels, np.ascontiguousarray(objects.masks[:, :, ::-1]))


def cropped_objects(
    image: Image.Image, objects: Objects, *, left: int, top: int, width: int, height: int
) -> tuple[Image.Image, Objects]:
    """A crop of both; objects of which less than a pixel remains are removed."""
    shifted = objects.boxes - np.array([left, top, left, top], dtype=np.float32)
    boxes = np.clip(shifted, 0, np.array([width, height, width, height], dtype=np.float32))
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
    masks = objects.masks[kept, top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height)), Objects(boxes[kept], objects.labels[kept], masks)


def draw_box_crop(image: Image.Image, objects: Objects, settings: DetectSettings) -> tuple[Image.Image, Objects]:
    """A training view, drawn from Python's generator: optionally flipped, optionally cropped, resized. A crop may
    leave no object."""
    if random.random() < settings.flip:
        image, objects = flipped_objects(image, objects)
    if random.random() < settings.crop:
        side = random.choice(FIRST_SIDES)
        first, there = resized_objects(image, objects, fitted_size(*image.size, (settings.long_side, side)))
        least, most = settings.crop_range
        width = random.randint(min(first.width, least), min(first.width, most))
        height = random.randint(min(first.height, least), min(first.height, most))
        left, top = random.randint(0, first.width - width), random.randint(0, first.height - height)
        image, objects = cropped_objects(first, there, left=left, top=top, width=width, height=height)
    side = random.choice(settings.short_sides)
    return resized_objects(image, objects, fitted_size(*image.size, (settings.long_side, side)))


def padded(images: Sequence[np.ndarray], fill: tuple[int, ...]) -> np.ndarray:
    """Images uint8 (h, w, 3) of any sizes as one array (c, 3, H, W), padded below and to the right."""
    height, width = (-(-max(image.shape[axis] for image in images) // DIVISOR) * DIVISOR for axis in (0, 1))
    whole = np.empty((len(images), height, width, 3), dtype=np.uint8)
    whole[:] = fill
    for part, image in zip(whole, images, strict=True):
        part[: image.shape[0], : image.shape[1]] = image
    return np.ascontiguousarray(whole.transpose(0, 3, 1, 2))


class BoxReader(Reader):
    """Chunks of training views. Raises SourceError if an image does not fit its annotations."""

    def __init__(
        self,
        data: CocoImages,
        schedule: TrainSchedule,
        own: Sequence[int],
        *,
        start: int,
        settings: DetectSettings,
        mean: tuple[float, ...],
    ):
        super().__init__(schedule, own, start)
        self.root, self.data, self.settings = data.root, data, settings
        self.fill = tuple(round(255 * channel) for channel in mean)

    def __getitem__(self, index: int) -> BoxChunk:
        step, number = self.place(index)
        chosen = self.schedule.chunk(step, number)
        views = []
        for image in chosen.tolist():
            with seeded("boxes", self.settings.seed, self.schedule.epoch(step), image):
                views.append(draw_box_crop(*self.data.read(image), self.settings))
        pixels = padded([np.asarray(image) for image, _ in views], self.fill)
        targets = tuple(
            {
                "boxes": torch.from_numpy(objects.boxes),
                "labels": torch.from_numpy(objects.labels),
                "masks": torch.from_numpy(np.ascontiguousarray(objects.masks)),
            }
            for _, objects in views
        )
        sizes = tuple((image.height, image.width) for image, _ in views)
        return BoxChunk(step, number, torch.from_numpy(pixels), torch.from_numpy(chosen), sizes=sizes, targets=targets)


class ScoredReader:
    """Val images at the size for scoring, uint8 (3, H, W), padded; with height and width before padding; picklable."""

    def __init__(self, data: CocoImages, own: Sequence[int], settings: DetectSettings, *, mean: tuple[float, ...]):
        self.data, self.own, self.settings = data, own, settings
        self.fill = tuple(round(255 * channel) for channel in mean)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        image = self.data.image(self.own[index])
        scale = self.settings.long_side, max(self.settings.short_sides)
        image = image.resize(fitted_size(*image.size, scale), Image.Resampling.BILINEAR)
        return padded([np.asarray(image)], self.fill)[0], (image.height, image.width)
