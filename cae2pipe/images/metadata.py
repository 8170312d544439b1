"""Metadata of image files: EXIF, XMP, texts, which may be damaged although the pixels are intact."""

from __future__ import annotations

import re
import struct
import zlib
from contextlib import suppress

from PIL import ExifTags, Image

from cae2pipe.runtime.exhaustion import reraise_exhaustion

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by EXIF orientation."""

PNG = b"\x89PNG\r\n\x1a\n"
KEPT_CHUNKS = (b"tRNS", b"eXIf")
"""Ancillary PNG chunks that affect pixels or orientation. Critical ones begin with a capital letter."""

TIFF_STRUCTURE = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 288, 289, 292, 293, 297, 317}
    | {*range(320, 326), 332, 334, *range(336, 344), 347, *range(512, 522), *range(529, 533)}
)
"""Tags of a TIFF that say how its pixels are stored, and their orientation."""


def read_orientation(image: Image.Image) -> int:
    """An image's EXIF orientation, 1 to 8; 1 if none can be read."""
    orientation: object = None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # Pillow raises many types: ValueError, SyntaxError, struct.error, ...
        reraise_exhaustion(error)
    if orientation is None and isinstance(exif := image.info.get("exif"), bytes):
        # Pillow stops at the first damaged tag.
        orientation = _orientation_tag(exif)
    return orientation if isinstance(orientation, int) and orientation in TRANSPOSITIONS else 1


def _orientation_tag(exif: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block, whatever the other tags are."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    with suppress(struct.error):
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", exif, entry)
            if tag == ExifTags.Base.Orientation and kind == 3 and number == 1:
                return int(struct.unpack_from(order + "H", exif, entry + 8)[0])
    return None


def turn_upright(image: Image.Image) -> Image.Image:
    """The image rotated according to its EXIF orientation; the same object if that is 1.

    ``ImageOps.exif_transpose`` rewrites the EXIF block, and fails if that is damaged.
    """
    orientation = read_orientation(image)
    return image if orientation == 1 else image.transpose(TRANSPOSITIONS[orientation])


def without_metadata(data: bytes) -> bytes:
    """A JPEG, PNG, TIFF or AVIF without the parts that pixels do not depend on; other data unchanged."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _bare_jpeg(data)
        if data.startswith(PNG):
            return _bare_png(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _bare_tiff(data)
    except (IndexError, struct.error):
        return data
    if data[4:8] == b"ftyp":
        # Decoders skip items of unknown types.
        return re.sub(rb"(infe.{8}(?:..)?)Exif", rb"\1free", data, flags=re.DOTALL)
    return data


def _bare_jpeg(data: bytes) -> bytes:
    """Keeps JFIF and Adobe, which define how colours are stored, and EXIF."""
    kept, position = [data[:2]], 2
    while data[position] == 0xFF and (marker := data[position + 1]) != 0xDA:
        if marker == 0xFF:  # padding
            position += 1
            continue
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        exif = marker == 0xE1 and data[position + 4 :].startswith(b"Exif\0\0")
        if marker in (0xE0, 0xEE) or exif or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def _bare_png(data: bytes) -> bytes:
    kept, position = [PNG], len(PNG)
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        whole = data[end - 4 : end] == struct.pack(">I", zlib.crc32(data[position + 4 : end - 4]))
        if kind[:1].isupper() or (kind in KEPT_CHUNKS and whole):
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _bare_tiff(data: bytes) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    entries = [data[start + 2 + 12 * number :][:12] for number in range(count)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in TIFF_STRUCTURE]
    # No further directory: only the first of several pages is used.
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
