"""Stored views by simplejpeg, which decodes them in about half of Pillow's time, to the same pixels."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, features

WRITTEN = re.compile(
    rb"\xff\xd8"
    rb"\xff\xe0\0\x10JFIF\0.{9}"
    rb"\xff\xdb\0\x43\0.{64}\xff\xdb\0\x43\x01.{64}"
    # 8 bits, height, width, and the sampling factors of 4:4:4, 4:2:2 or 4:2:0.
    rb"\xff\xc0\0\x11\x08(..)(..)\x03\x01[\x11\x21\x22]\0\x02\x11\x01\x03\x11\x01"
    rb"\xff\xc4\0\x1f\0.{28}\xff\xc4\0\xb5\x10.{178}\xff\xc4\0\x1f\x01.{28}\xff\xc4\0\xb5\x11.{178}"
    rb"\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0",
    re.DOTALL,
)
"""Everything before the coefficients in a JPEG that ``encode_jpeg`` wrote."""


def written_sides(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG as ``encode_jpeg`` writes it; None for any other data, which Pillow has to judge."""
    match = WRITTEN.match(data)
    if match is None:
        return None
    height, width = (int.from_bytes(side) for side in match.groups())
    # Pillow warns of more pixels, and rejects twice as many.
    most = Image.MAX_IMAGE_PIXELS
    return (height, width) if height and width and (most is None or height * width <= most) else None


def decode_written(data: bytes, out: np.ndarray) -> bool:
    """Decode a JPEG as ``encode_jpeg`` writes it into ``out``, uint8 (H, W, 3) and C-contiguous.

    Releases the GIL. Returns False, with ``out`` undefined, wherever Pillow might give other pixels or an error:
    another kind of JPEG, another size, data at which libjpeg warns; or no simplejpeg.
    """
    decode = simplejpeg_decoder()
    sides = written_sides(data)
    if decode is None or sides is None or out.shape != (*sides, 3) or out.dtype != np.uint8:
        return False
    try:
        decode(data, "RGB", buffer=out, strict=True)
    except (ValueError, RuntimeError):
        return False
    return True


@functools.cache
def simplejpeg_decoder() -> Callable[..., np.ndarray] | None:
    """simplejpeg's ``decode_jpeg``; None without it, or where Pillow has no libjpeg-turbo, whose pixels these are."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    decode: Callable[..., np.ndarray] = decode_jpeg
    return decode if features.check("libjpeg_turbo") else None
