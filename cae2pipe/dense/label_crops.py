"""Training crops of images with label maps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from cae2pipe.config.dense import SegmentSettings
from cae2pipe.dense.distortion import distort
from cae2pipe.dense.label_maps import LabelledImages
from cae2pipe.dense.upernet import IGNORED
from cae2pipe.runtime.seeded import seeded
from cae2pipe.supervised.schedule import Chunk, Reader, TrainSchedule

TRIES = 10


def fitted_size(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int]:
    """The largest size of the same aspect ratio whose long and short sides are at most those of ``scale``."""
    long, short = max(scale), min(scale)
    factor = min(long / max(width, height), short / min(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def draw_crop(
    image: Image.Image, labels: np.ndarray, settings: SegmentSettings, *, fill: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop: resized, cut, flipped, distorted, padded; drawn from Python's generator.

    Args:
        image: RGB. labels: uint8 (H, W). fill: colour of the padding.

    Returns:
        uint8 (S, S, 3) and uint8 (S, S).
    """
    factor = random.uniform(*settings.scale_range)
    size = fitted_size(*image.size, (settings.scale[0] * factor, settings.scale[1] * factor))
    image = image.resize(size, Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    side = settings.image_size
    for _ in range(TRIES):
        top = random.randint(0, max(0, size[1] - side))
        left = random.randint(0, max(0, size[0] - side))
        cut = labels[top : top + side, left : left + side]
        counts = np.bincount(cut[cut != IGNORED])
        if np.count_nonzero(counts) > 1 and counts.max() < settings.category_share * counts.sum():
            break
    image = image.crop((left, top, left + cut.shape[1], top + cut.shape[0]))
    if random.random() < settings.flip:
        image, cut = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), cut[:, ::-1]
    if settings.distort:
        image = distort(image)
    pixels = np.empty((side, side, 3), dtype=np.uint8)
    pixels[:] = fill
    mask = np.full((side, side), IGNORED, dtype=np.uint8)
    pixels[: cut.shape[0], : cut.shape[1]] = np.asarray(image)
    mask[: cut.shape[0], : cut.shape[1]] = cut
    return pixels, mask


class LabelCropReader(Reader):
    """Chunks of random crops with label maps: labels are int64 (c, S, S). Raises SourceError if an image and its labels
    do not fit together.
    """

    def __init__(
        self,
        data: LabelledImages,
        schedule: TrainSchedule,
        own: Sequence[int],
        *,
        start: int,
        settings: SegmentSettings,
        mean: tuple[float, ...],
    ):
        super().__init__(schedule, own, start)
        self.root, self.data, self.settings = data.root, data, settings
        self.fill = tuple(round(255 * channel) for channel in mean)

    def __getitem__(self, index: int) -> Chunk:
        step, number = self.place(index)
        crops = []
        for image in self.schedule.chunk(step, number).tolist():
            with seeded("labels", self.settings.seed, self.schedule.epoch(step), image):
                crops.append(draw_crop(*self.data.read(image), self.settings, fill=self.fill))
        pixels = np.stack([crop.transpose(2, 0, 1) for crop, _ in crops])
        labels = np.stack([mask for _, mask in crops])
        return Chunk(step, number, torch.from_numpy(pixels), torch.from_numpy(labels).long())
