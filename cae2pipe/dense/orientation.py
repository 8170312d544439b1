"""Whether labels refer to the stored or the displayed orientation of an image with an EXIF orientation: determined by
their size, or by a setting."""

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
"""Files whose headers are read concurrently: the time is spent on disk or network."""
QUARTER_TURNS = (5, 6, 7, 8)

Size = tuple[int, int]


@dataclass(frozen=True)
class Sides:
    """An image's size (width, height) as stored, and its EXIF orientation, 1 to 8."""

    stored: Size
    orientation: int

    @property
    def upright(self) -> Size:
        """The size in which viewers show it."""
        width, height = self.stored
        return (height, width) if self.orientation in QUARTER_TURNS else self.stored


def read_sides(paths: Sequence[Path]) -> list[Sides]:
    """Sizes and orientations of images, from their headers.

    Raises:
        SourceError: one is missing, is not a file, or is not an image.
    """
    # Not in the threads, since they share one list of filters.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as threads:
        warnings.simplefilter("ignore")
        return list(threads.map(_sides, paths))


def is_upright(sides: Sides, size: Size | None, upright: bool | None, *, where: Path, whose: str) -> bool:
    """Whether labels of ``size`` refer to the image as viewers show it, not as it is stored.

    Args:
        size: (width, height) of the labels; None: unknown. upright: the answer if both fit.
        where: the file to name in errors. whose: the name of the labels in errors.

    Raises:
        SourceError: neither fits; or both fit although they differ, and ``upright`` is None.
    """
    stored, shown = (size in (None, either) for either in (sides.stored, sides.upright))
    turns = f"EXIF orientation {sides.orientation} is applied"
    if not stored and not shown and size is not None:
        exif = "" if sides.orientation == 1 else f", or {times(sides.upright)} if {turns}"
        raise SourceError(
            f"size mismatch: {whose} are for {times(size)} pixels, but the image has {times(sides.stored)}{exif}",
            where=where,
            fix="use the images that the labels were made for",
        )
    if sides.orientation == 1 or not shown:
        return False
    if not stored:
        return True
    if upright is None:
        raise SourceError(
            f"it is unknown whether {whose} refer to the image before or after {turns}: both sizes are the same",
            where=where,
            fix="--set upright=true if the labels were drawn on the image as viewers show it, upright=false if "
            "they refer to the stored pixels",
        )
    return upright


def times(size: Size) -> str:
    """A size as text: ``96 x 64``."""
    return f"{size[0]} x {size[1]}"


def _sides(path: Path) -> Sides:
    try:
        # Opening a pipe would block.
        if path.exists() and not path.is_file():
            raise SourceError("this is not a file", where=path, fix="replace it")
        try:
            with Image.open(path, formats=FORMATS) as image:
                return Sides(image.size, orientation_of(image, path))
        except (
            Exception
        ) as error:  # Pillow's plugins raise many types, some for broken metadata although the pixels are intact
            reraise_exhaustion(error)
            if isinstance(error, OSError) and error.errno:
                raise
            return Sides(decode_rgb(path.read_bytes(), where=path, upright=False).size, 1)
    except OSError as error:
        raise SourceError(
            f"this image cannot be read: {error.strerror}", where=path, fix="add it, or make it readable"
        ) from None
    except ImageError as error:
        raise SourceError(error.what, where=path, fix="replace it") from None


def orientation_of(image: Image.Image, path: Path) -> int:
    """The EXIF orientation of an opened, not yet decoded image; 1 if there is none or it cannot be read."""
    # Pillow would decode a whole PNG to find out whether a profile follows the pixels.
    if image.format == "PNG" and not any(key in path.read_bytes() for key in (b"eXIf", b"Raw profile", b"xmp")):
        return 1
    return read_orientation(image)
