"""Images as a target set stores them: once each, reduced; views are cropped from them whenever they are loaded.

A view is a known crop, flip and jitter of one image. The images of a set with replayed views are those stored here:
draws are made for their sizes, and the teacher sees crops of their JPEGs, as training does later.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.images.jpeg import VERIFY, decode_into, decode_view, open_jpeg
from cae2pipe.images.reduced import reduced_view
from cae2pipe.images.views import ViewDraw, encode_jpeg, render_view, resize

LONGEST = 65500
"""Largest side of a JPEG in pixels, in libjpeg."""


def reduce_image(image: Image.Image, side: int) -> Image.Image:
    """An RGB image reduced to a short side of ``side`` pixels and a long side that a JPEG allows, if it is larger."""
    factor = min(side / min(image.size), LONGEST / max(image.size))
    if factor >= 1:
        return image
    width, height = (max(1, round(length * factor)) for length in image.size)
    return resize(image, width, height)


def keep_image(image: Image.Image, settings: ViewSettings) -> bytes:
    """The stored JPEG of an RGB image. Its bytes depend only on the image's pixels and the settings."""
    return encode_jpeg(reduce_image(image, settings.kept_side), settings)


def view_pixels(
    jpeg: bytes, draw: np.ndarray, replayed: ViewSettings | None, *, size: int, view_size: int | None = None
) -> np.ndarray:
    """A view's pixels, uint8 (size, size, 3), from the stored JPEG; arguments and errors as for ``view_into``."""
    out = np.empty((size, size, 3), dtype=np.uint8)
    view_into(jpeg, draw, replayed, out, view_size=view_size)
    return out


def view_into(
    jpeg: bytes, draw: np.ndarray, replayed: ViewSettings | None, out: np.ndarray, *, view_size: int | None = None
) -> None:
    """Write a view's pixels into ``out``, uint8 (S, S, 3) and C-contiguous, such as a row of a batch.

    A stored view of more than S pixels is reduced; a replayed one is cropped at S pixels directly.

    Args:
        jpeg: the view, or the image that it is cropped from. draw: its row of draws (11,). replayed: how views are
            cropped, None if they are stored. view_size: side of a stored view in pixels; None: S.

    Raises:
        ImageError: not an RGB JPEG, or one of another size. ``out`` is undefined then.
    """
    side = len(out)
    if replayed is None and view_size in (None, side):
        decode_into(jpeg, out)
        return
    if replayed is None:
        out[...] = np.asarray(reduced_view(Image.fromarray(decode_view(jpeg, view_size)), side))
        return
    try:
        out[...] = np.asarray(render_view(open_jpeg(jpeg), ViewDraw.from_row(draw), replayed, size=side))
    except ImageError as error:
        raise ImageError(error.what, fix=VERIFY) from None
