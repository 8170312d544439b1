"""The crop that encoders are scored on."""

from __future__ import annotations

from PIL import Image


def evaluation_crop(image: Image.Image, size: int = 224, resize: int = 256) -> Image.Image:
    """The shorter side to ``resize`` pixels (bicubic), then the central ``size`` x ``size`` pixels."""
    scale = resize / min(image.size)
    width, height = (max(resize, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
