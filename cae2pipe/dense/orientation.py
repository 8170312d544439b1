"""Which way up labels see an image whose EXIF orientation turns it: labels say by their size, or a setting does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cae2pipe.errors import ImageError, SourceError
from cae2pipe.images.decode import FORMATS, decode_rgb
from cae2pipe.images.metadata import read_orientation
from cae2pipe.runtime.exhaustion import reraise_exhaustion

THREADS = 16
"""Files whose headers are read at once: what takes time is a disk, or a network."""
QUARTER_TURNS = (5, 6, 7, 8)

Size = tuple[int, int]


@dataclass(frozen=True)
class Sides:
    """An image's size (width, height) as it is stored, and its EXIF orientation, 1 to 8."""

    stored: Size
    orientation: int

    @property
    def upright(self) -> Size:
        """The size of what viewers show."""
        width, height = self.stored
        return (height, width) if self.orientation in QUARTER_TURNS else self.stored


def read_sides(paths: Sequence[Path]) -> list[Sides]:
    """Sizes and orientations of images, from their headers.

    Raises:
        SourceError: one is missing, is no file, or no image.
    """
    # Not in the threads, which share one list of filters.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as threads:
        warnings.simplefilter("ignore")
        return list(threads.map(_sides, paths))


def is_upright(sides: Sides, size: Size | None, upright: bool | None, *, where: Path, whose: str) -> bool:
    """Whether labels of ``size`` are of the image as viewers show it, not as it is stored.

    Args:
        size: of the labels, (width, height); None: not known. upright: which is meant where both fit.
        where: the file to name in errors. whose: what the labels are called in errors.

    Raises:
        SourceError: neither fits; or both do and are not the same, and ``upright`` is None.
    """
    stored, shown = (size in (None, either) for either in (sides.stored, sides.upright))
    turns = f"its EXIF orientation, {sides.orientation}, turns it"
    if not stored and not shown and size is not None:
        exif = "" if sides.orientation == 1 else f", or {times(sides.upright)} where {turns}"
        raise SourceError(
            f"{whose} are for {times(size)} pixels, and the image has {times(sides.stored)}{exif}",
            where=where,
            fix="give the images that the labels were made for",
        )
    if sides.orientation == 1 or not shown:
        return False
    if not stored:
        return True
    if upright is None:
        raise SourceError(
            f"nothing says whether {whose} are of the image before or after {turns}: both sizes are the same",
            where=where,
            fix="--set upright=true where the labels were drawn on the image as viewers show it, upright=false where "
            "they are of the pixels as they are stored",
        )
    return upright


def times(size: Size) -> str:
    """A size in print: ``96 x 64``."""
    return f"{size[0]} x {size[1]}"


def _sides(path: Path) -> Sides:
    try:
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise SourceError("this is no file", where=path, fix="replace it")
        try:
            with Image.open(path, formats=FORMATS) as image:
                return Sides(image.size, orientation_of(image, path))
        except Exception as error:  # Pillow's plugins raise many kinds, some for broken metadata beside whole pixels
            reraise_exhaustion(error)
            if isinstance(error, OSError) and error.errno:
                raise
            return Sides(decode_rgb(path.read_bytes(), where=path, upright=False).size, 1)
    except OSError as error:
        raise SourceError(f"this image cannot be read: {error.strerror}", where=path, fix="bring it") from None
    except ImageError as error:
        raise SourceError(error.what, where=path, fix="replace it") from None


def orientation_of(image: Image.Image, path: Path) -> int:
    """The EXIF orientation of an image that is open and not decoded yet; 1 where there is none that can be read."""
    # Pillow would decode a whole PNG to see whether a profile follows its pixels.
    if image.format == "PNG" and not any(key in path.read_bytes() for key in (b"eXIf", b"Raw profile", b"xmp")):
        return 1
    return read_orientation(image)
