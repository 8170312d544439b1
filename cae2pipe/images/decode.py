"""Any image file to RGB, the same way in every stage."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from cae2pipe.errors import ImageError
from cae2pipe.images.metadata import turn_upright, without_metadata
from cae2pipe.runtime.exhaustion import reraise_exhaustion

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Decoded formats. Pillow supports more, but runs other programs for some of them (such as EPS)."""

ROOM = 2**28
"""Free bytes required to blame a failure on the image. A progressive JPEG of 32 megapixels takes 8 bytes per pixel."""

STRIP = 2**22
"""Pixels that are converted at a time. Pillow refuses images of more than 179 million pixels, and uses 4 bytes per
pixel: the largest images take 1.5 GB, decoded and as RGB, whatever their mode."""


def decode_rgb(data: bytes, where: object, upright: bool = True) -> Image.Image:
    """Decode an image of any of ``FORMATS``, whatever its name says, into RGB.

    EXIF orientation is applied (unless ``upright`` is false), transparency composed on white, 16-bit grey scaled to
    8 bits; palettes, greyscale and CMYK are converted. The first frame of an animation is used. Damaged EXIF, XMP or
    text at most loses the image's orientation.

    Args:
        data: the file's bytes.
        where: the image's name for errors.

    Raises:
        ImageError: the bytes are invalid. MemoryError: memory has run out, which says nothing about the bytes.
    """
    try:
        # Images that Pillow warns about (odd EXIF, palettes with transparency, large size) either decode or raise.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_pixels(data)
            return to_rgb(turn_upright(image) if upright else image)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"this image is too large: {describe_failure(error)}", where=where, fix="scale it down, or remove it"
        ) from None
    except Exception as error:  # Pillow's plugins raise many types: OSError, SyntaxError, struct.error, ValueError, ...
        reraise_exhaustion(error)
        # libjpeg (for progressive files) and libwebp report a lack of memory as damaged data: then this raises
        # MemoryError.
        bytes(ROOM)  # allocated but never touched, which takes no time
        reason = describe_failure(error)
        raise ImageError(f"this image cannot be decoded: {reason}", where=where, fix="replace or remove it") from None


def check_decodes(data: bytes, where: object) -> None:
    """Raise what ``decode_rgb`` would.

    Most JPEGs are decoded at an eighth of their size, in half of the time: all of their data is still read.
    """
    if not _decodes_reduced(data):
        decode_rgb(data, where)


SAMPLINGS = frozenset({(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)})
"""Sampling factors of luma, with chroma's (1, 1), from which libjpeg enlarges chroma at any scale."""


def _decodes_reduced(data: bytes) -> bool:
    """Whether a JPEG surely decodes at its full size as well; false for other files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG",))
            if not isinstance(image, JpegImageFile) or (image.format, image.mode) != ("JPEG", "RGB"):
                return False
            luma, *chroma = [(layer[1], layer[2]) for layer in image.layer]
            if luma not in SAMPLINGS or chroma != [(1, 1), (1, 1)]:
                return False
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Exception as error:  # decode_rgb says what it is
        reraise_exhaustion(error)
        return False
    return True


def open_pixels(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image with its pixels loaded, in the mode and orientation of the file.

    Metadata that Pillow rejects is dropped. Raises Pillow's errors.
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
    """Pillow's message in one line and without memory addresses, so that equal bytes give equal reasons."""
    return str(error).replace("\n", " ").split("<_io")[0].strip() or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.width * image.height <= STRIP:
        return _convert(image)
    # A conversion makes several copies of its input.
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_convert(strip), (0, top))
    return whole


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its variants, and I, as which Pillow opens some 16-bit files
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
