"""Which files of a source are images: by their suffix, or else by their first bytes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


SUFFIXES = _suffixes(
    "jpg jpeg jpe jfif pjpeg pjp mpo png apng webp bmp gif tif tiff ppm pgm pbm pnm pfm "
    "jp2 j2k j2c jpc jpf jpx avif avifs"
)
"""Images in formats that are decoded."""

FOREIGN = _suffixes(
    "heic heif hif jxl tga icb vda vst dib ico cur icns pcx dcx sgi bw rgb rgba ras dds qoi xbm xpm blp im msp exr hdr "
    "pxr fits dcm"
)
"""Images in formats that are not decoded: they become rejects, unless their content has a supported format."""

PLAIN = _suffixes(
    "txt cls json jsonl xml csv tsv md html yaml yml py sh npy npz mat h5 pkl pt pth safetensors parquet log "
    "dng cr2 cr3 nef nrw arw orf rw2 raf pef srw"
)
"""Not images, whatever their first bytes: labels, texts, arrays, and camera raw files, which look like TIFFs."""

HEAD = 32
"""Bytes of a file that ``begins_as_image`` looks at."""

_HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|"
    rb"BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[1-6]\s+[#\d]|"
    rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|....ftypavi[fs]",
    re.DOTALL,
)


def suffix(path: str) -> str:
    """``.jpg`` of a POSIX path, in lower case; "" if there is none."""
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - a Path for each of a million names is slow


def is_image(path: str) -> bool:
    """Whether a file's suffix is that of an image, in upper or lower case."""
    return suffix(path) in SUFFIXES or suffix(path) in FOREIGN


def is_tar(path: str) -> bool:
    return suffix(path) == ".tar"


def may_be_image(path: str) -> bool:
    """Whether only the content shows if the file is an image."""
    return not is_image(path) and not is_tar(path) and suffix(path) not in PLAIN


def begins_as_image(head: bytes) -> bool:
    """Whether these first ``HEAD`` bytes are those of a format that is decoded."""
    return _HEADS.match(head) is not None


def stem(path: str) -> str:
    """A path without an image's suffix; unchanged if it has none (``scan.001`` is not ``scan``)."""
    return path[: -len(suffix(path))] if is_image(path) else path


def kind(path: str) -> str:
    """The kind of a skipped file: its suffix."""
    return suffix(path) or "suffixless"


def describe_kinds(kinds: Iterable[str] | Counter[str], most: int = 3) -> str:
    """``12 .txt files, 1 .csv file``: the most frequent kinds first."""
    counts = Counter(kinds)
    shown = [f"{count} {kind} file{'s' * (count > 1)}" for kind, count in counts.most_common(most)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(most))
    return ", ".join(shown + [f"{rest} more"] * (rest > 0))
