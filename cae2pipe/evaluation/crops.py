"""Input crops of encoders: the central crop for scoring, random crops for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cae2pipe.config.evaluate import DrawSettings
from cae2pipe.images.evaluation_crop import evaluation_crop
from cae2pipe.images.views import drawn_sides
from cae2pipe.runtime.keyed import keyed_uniforms
from cae2pipe.runtime.seeded import seeded


class Crop(Protocol):
    """From an RGB image and a key to pixels, uint8 (size, size, 3); picklable."""

    @property
    def size(self) -> int: ...

    def __call__(self, image: Image.Image, key: str | int) -> np.ndarray: ...


@dataclass(frozen=True)
class CentralCrop:
    """The central ``size`` pixels of an image, after resizing its shorter side to ``resize``."""

    size: int
    resize: int

    def __call__(self, image: Image.Image, key: str | int) -> np.ndarray:
        return np.asarray(evaluation_crop(image, self.size, self.resize))


@dataclass(frozen=True)
class DrawnCrop:
    """A random resized crop with optional flip and RandAugment: the same for equal (seed, epoch, key).

    ``mean`` is the colour, in [0, 1], with which RandAugment fills empty corners.
    """

    size: int
    settings: DrawSettings
    mean: tuple[float, ...]
    seed: int
    epoch: int = 0

    def __call__(self, image: Image.Image, key: str | int) -> np.ndarray:
        transform = _transform(self.size, self.settings, self.mean)
        if self.settings.clip:
            uniforms = keyed_uniforms(4, "clipped crop", self.seed, self.epoch, key).tolist()
            top, left, height, width = clipped_box(self.settings, uniforms, image.height, width=image.width)
            box = image.crop((left, top, left + width, top + height))
            image = box.resize((self.size, self.size), Image.Resampling.BICUBIC)
        with seeded("crop", self.seed, self.epoch, key):
            return np.asarray(transform(image))


def clipped_box(
    settings: DrawSettings, uniforms: Sequence[float], height: int, *, width: int
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a crop that is drawn once and clipped to the image, from four uniforms in [0, 1).

    As in MAE's and CAE's linear probes. The mean crop is larger than timm's, and long images give ratios beyond
    ``settings.ratio``.
    """
    area_draw, ratio_draw, top_draw, left_draw = uniforms
    h, w = drawn_sides(settings.scale, settings.ratio, area_draw, ratio_draw=ratio_draw, area=height * width)
    h, w = min(max(h, 1), height), min(max(w, 1), width)
    return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w


@cache
def _transform(size: int, settings: DrawSettings, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """timm's training transform up to the conversion to a tensor, in timm's order; without its crop if ``clip``."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
    from torchvision.transforms import Compose, RandomHorizontalFlip

    steps: list[Any] = [RandomHorizontalFlip(settings.flip)]
    if not settings.clip:
        steps.insert(0, RandomResizedCropAndInterpolation(size, settings.scale, settings.ratio, "bicubic"))
    if settings.rand_augment:
        hints = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
            "interpolation": str_to_pil_interp("bicubic"),
            # At magnitude 10 timm requests images of 0 bits. Older versions of Pillow made them black, newer ones
            # refuse.
            "magnitude_max": 9.99,
        }
        steps.append(rand_augment_transform(f"rand-m{settings.rand_augment}-mstd0.5-inc1", hints))
    transform: Callable[[Image.Image], Image.Image] = Compose(steps)
    return transform
