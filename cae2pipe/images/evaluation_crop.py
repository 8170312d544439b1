"""The crop that encoders are evaluated on."""

from __future__ import annotations

from PIL import Image


def evaluation_crop(image: Image.Image, size: int = 224, resize: int = 256) -> Image.Image:
    """Resize the shorter side to ``resize`` pixels (bicubic), then take the central ``size`` x ``size`` pixels.

    Rounds as torchvision's ``Resize`` and ``CenterCrop`` do. ``resize`` is at least ``size``.
    """
    short = min(image.size)
    if short != resize:
        width, height = (resize if side == short else resize * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
