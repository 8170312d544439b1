"""Any image file to RGB, the same way in every stage."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from cae2pipe.errors import ImageError
from cae2pipe.images.metadata import turn_upright, without_metadata
from cae2pipe.runtime.exhaustion import reraise_exhaustion

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded. Pillow knows more, but hands some of it (EPS, say) to other programs."""

ROOM = 2**28
"""Bytes that must be free for a failure to be the image's. A progressive JPEG of 32 megapixels takes 8 a pixel."""

STRIP = 2**22
"""Pixels that are converted at a time. Pillow refuses more than 179 million, and takes 4 bytes for one: the largest
images take 1.5 GB, decoded and as RGB, whatever their mode."""


def decode_rgb(data: bytes, where: object, upright: bool = True) -> Image.Image:
    """Decode an image of any of ``FORMATS``, whatever its name says, into RGB.

    EXIF orientation is applied (unless ``upright`` is false), transparency laid over white, 16-bit grey scaled to 8
    bits; palettes, greyscale and CMYK are converted. Of an animation the first frame is taken. Pixels decide: EXIF, XMP
    or texts that are broken cost an image its orientation at most.

    Args:
        data: the file's bytes.
        where: what to call the image in errors.

    Raises:
        ImageError: whatever is wrong with the bytes. MemoryError: memory has ended, which says nothing about them.
    """
    try:
        # What Pillow warns of (odd EXIF, palettes with transparency, large pictures) either decodes or raises.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_pixels(data)
            return to_rgb(turn_upright(image) if upright else image)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"this image is too large: {describe_failure(error)}", where=where, fix="scale it down, or remove it"
        ) from None
    except Exception as error:  # Pillow's plugins raise many kinds: OSError, SyntaxError, struct.error, ValueError, ...
        reraise_exhaustion(error)
        # libjpeg (of progressive files) and libwebp report the end of memory as broken data: MemoryError, if so.
        bytes(ROOM)  # reserved and never touched, which takes no time
        reason = describe_failure(error)
        raise ImageError(f"this image cannot be decoded: {reason}", where=where, fix="replace or remove it") from None


def open_pixels(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image with its pixels loaded, in the mode and orientation of the file.

    Metadata that Pillow refuses are left out. Raises what Pillow raises.
    """
    try:
        return _load(data, formats)
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        reraise_exhaustion(error)
        bare = without_metadata(data)
        if bare == data:
            raise
        try:
            return _load(bare, formats)
        except Exception as second:
            reraise_exhaustion(second)
            raise error from None


def _load(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    image.load()
    return image


def describe_failure(error: Exception) -> str:
    """What Pillow said, in one line and without memory addresses: equal bytes give equal reasons."""
    return str(error).replace("\n", " ").split("<_io")[0].strip() or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.width * image.height <= STRIP:
        return _convert(image)
    # A conversion takes several copies of what it converts.
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_convert(strip), (0, top))
    return whole


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and relatives, and I, which is how Pillow opens some 16-bit files
        # 65535 / 257 is 255: white stays white.
        levels = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
