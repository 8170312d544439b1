"""Photometric distortion of training crops, as in mmsegmentation's ``PhotoMetricDistortion`` (CAE's configuration)."""

from __future__ import annotations

import random

from PIL import Image

BRIGHTNESS = 32
"""Largest shift of brightness, in levels of 255."""
FACTORS = (0.5, 1.5)
"""Range of the factors of contrast and saturation."""
HUE = 18
"""Shifts of the hue are whole numbers from -18 to 17, in units of 1/180 of the circle."""
CIRCLE = 255
"""The hue's circle in Pillow's HSV."""


def distort(image: Image.Image) -> Image.Image:
    """An RGB image with brightness, contrast, saturation and hue changed, each with a probability of 0.5; drawn from
    Python's generator.

    Contrast, a factor of all values, is changed before saturation and hue or after them, equally often. Channels are
    never swapped: mmsegmentation lists this step, but does not have it.
    """
    if _coin():
        image = shifted_brightness(image, random.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = _coin()
    if contrast_first and _coin():
        image = scaled_contrast(image, random.uniform(*FACTORS))
    if _coin():
        image = scaled_saturation(image, random.uniform(*FACTORS))
    if _coin():
        image = shifted_hue(image, random.randrange(-HUE, HUE))
    if not contrast_first and _coin():
        image = scaled_contrast(image, random.uniform(*FACTORS))
    return image


def _coin() -> bool:
    return random.random() < 0.5


def shifted_brightness(image: Image.Image, delta: float) -> Image.Image:
    """RGB with ``delta`` added to all values."""
    return image.point([_byte(value + delta) for value in range(256)] * 3)


def scaled_contrast(image: Image.Image, factor: float) -> Image.Image:
    """RGB with all values times ``factor``."""
    return image.point([_byte(value * factor) for value in range(256)] * 3)


def scaled_saturation(image: Image.Image, factor: float) -> Image.Image:
    """RGB with the saturation, in HSV, times ``factor``."""
    hue, saturation, value = image.convert("HSV").split()
    saturation = saturation.point([_byte(level * factor) for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def shifted_hue(image: Image.Image, shift: int) -> Image.Image:
    """RGB with the hue turned by ``shift`` / 180 of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([round(level + shift * CIRCLE / 180) % CIRCLE for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _byte(value: float) -> int:
    return int(min(max(value, 0.0), 255.0))
