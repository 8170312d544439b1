"""Augmented views: drawn from a key, rendered.

As in the released code: colour jitter (brightness, contrast, saturation in a drawn order, no hue), horizontal flip,
random resized crop with bicubic interpolation, in this order on the full image (paper, Table 8).
"""

from __future__ import annotations

import io
import math
from dataclasses import astuple, dataclass, fields
from itertools import permutations
from operator import mul
from typing import Any

import numpy as np
from PIL import Image

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.runtime.keyed import keyed_uniforms

ORDERS = tuple(permutations(("brightness", "contrast", "saturation")))
"""Orders of the jitter's operations; a draw's ``order`` is an index into them."""

TRIES = 10
"""Crop boxes to try before using the largest central one, as in torchvision's RandomResizedCrop."""

FLIP, ORDER, FACTORS, ARTIFACTS = 0, 1, slice(2, 5), 5
"""The index of each draw in the key's uniforms. Part of the format: another index gives other views."""


LEVELS = bytes(range(256))
"""A pixel's possible values; as a curve it changes none."""


@dataclass(frozen=True)
class ViewDraw:
    """One view of one image: crop box in pixels of the flipped image, flip, jitter factors and their order."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    order: int
    source_height: int
    source_width: int

    def to_row(self) -> np.ndarray:
        """float64 (11,), columns as in ``DRAW_COLUMNS``."""
        return np.array(astuple(self), dtype=np.float64)

    @classmethod
    def from_row(cls, row: np.ndarray) -> ViewDraw:
        values: list[Any] = [int(value) for value in row]
        values[4] = bool(row[4])
        values[5:8] = [float(value) for value in row[5:8]]
        return cls(*values)


DRAW_COLUMNS = tuple(field.name for field in fields(ViewDraw))


def draw_view(settings: ViewSettings, seed: int, key: str, *, view: int, height: int, width: int) -> ViewDraw:
    """The draw of view ``view`` of the image with key ``key``, which is ``height`` x ``width`` pixels.

    It depends only on the arguments. The number of uniforms is fixed, so that no draw shifts another.
    """
    uniforms = keyed_uniforms(ARTIFACTS + 4 * TRIES, "view", seed, key, view).tolist()
    low, span = 1 - settings.jitter, 2 * settings.jitter
    brightness, contrast, saturation = (low + span * u for u in uniforms[FACTORS])
    top, left, box_height, box_width = draw_box(settings, uniforms[ARTIFACTS:], height, width=width)
    return ViewDraw(
        top=top,
        left=left,
        height=box_height,
        width=box_width,
        flip=uniforms[FLIP] < settings.flip,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        order=int(uniforms[ORDER] * len(ORDERS)),
        source_height=height,
        source_width=width,
    )


def draw_box(settings: ViewSettings, uniforms: list[float], height: int, *, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random resized crop; four uniforms per try."""
    narrow, wide = settings.ratio
    for area_draw, ratio_draw, top_draw, left_draw in zip(*[iter(uniforms)] * 4, strict=True):
        h, w = drawn_sides(settings.scale, settings.ratio, area_draw, ratio_draw=ratio_draw, area=height * width)
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    ratio = min(max(width / height, narrow), wide)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def drawn_sides(
    scale: tuple[float, float], ratio: tuple[float, float], area_draw: float, *, ratio_draw: float, area: int
) -> tuple[int, int]:
    """Height and width of a random crop of an image of ``area`` pixels: its share of them is uniform in ``scale``, the
    logarithm of width / height uniform over ``ratio``. The draws are in [0, 1)."""
    (small, large), (narrow, wide) = scale, ratio
    pixels = area * (small + (large - small) * area_draw)
    wider = math.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio_draw)
    return round(math.sqrt(pixels / wider)), round(math.sqrt(pixels * wider))


def render_view(
    image: Image.Image,
    draw: ViewDraw,
    settings: ViewSettings,
    grey: Image.Image | None = None,
    *,
    size: int | None = None,
) -> Image.Image:
    """The view of an RGB image: ``size`` pixels square, by default ``settings.size``.

    Gives the pixels of the published order, bit for bit, without jittering the whole image: every operation except
    contrast's mean is per pixel, so only operations before that mean need the pixels outside the box. Brightness and
    contrast change each value by itself, so both are looked up, together where nothing comes between them.

    Args:
        grey: ``image.convert("L")``, which several views of an image can share; None: it is made here.

    Raises:
        ImageError: the draw was made for an image of another size.
    """
    if image.size != (draw.source_width, draw.source_height):
        raise ImageError(
            f"the view was drawn for an image of {draw.source_width} x {draw.source_height} pixels, "
            f"but this one has {image.width} x {image.height}",
            fix="give the original that the view was drawn from",
        )
    order = ORDERS[draw.order]
    contrast = order.index("contrast")
    for name in order[:contrast]:
        if name == "brightness":
            image = _look_up(image, _curve(draw.brightness))
        else:
            image = _saturate(image, draw.saturation, grey)
        grey = None
    curve = _curve(draw.contrast, _mean(grey or image.convert("L")))
    left = draw.source_width - draw.left - draw.width if draw.flip else draw.left
    crop = image.crop((left, draw.top, left + draw.width, draw.top + draw.height))
    for name in order[contrast + 1 :]:
        if name == "brightness":
            curve = curve.translate(_curve(draw.brightness))
        else:
            crop, curve = _saturate(_look_up(crop, curve), draw.saturation), LEVELS
    crop = _look_up(crop, curve)
    if draw.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = size or settings.size
    return resize(crop, side, side)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic and antialiased, first across, then down: the same pixels with every version of Pillow.

    In a single call Pillow 13 chooses the order itself, and each pass rounds to whole levels.
    """
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


def _curve(factor: float, level: int = 0) -> bytes:
    """What Pillow's blending with a constant image of this level makes of each of the 256 values."""
    values = Image.frombytes("L", (len(LEVELS), 1), LEVELS)
    return Image.blend(Image.new("L", values.size, level), values, factor).tobytes()


def _look_up(image: Image.Image, curve: bytes) -> Image.Image:
    return image if curve == LEVELS else image.point(curve * 3)


def _saturate(image: Image.Image, factor: float, grey: Image.Image | None = None) -> Image.Image:
    return Image.blend((grey or image.convert("L")).convert("RGB"), image, factor)


def _mean(grey: Image.Image) -> int:
    """The mean level, rounded to the nearest."""
    return int(sum(map(mul, grey.histogram(), LEVELS)) / (grey.width * grey.height) + 0.5)


def encode_jpeg(image: Image.Image, settings: ViewSettings) -> bytes:
    """An RGB image as JPEG bytes, which depend only on its pixels and the settings."""
    buffer = io.BytesIO()
    # By default Pillow would copy the original's comment.
    image.save(buffer, "JPEG", quality=settings.quality, subsampling=settings.subsampling, comment=b"")
    return buffer.getvalue()
