"""The members of tars, from their headers. No header, however wrong, causes an endless loop or a read beyond the file.

Errors that ``tarfile`` ignores silently are raised here: a damaged header, which it takes for the archive's end, and
contradictory sizes. Concatenated archives in one file, as from ``cat a.tar b.tar``, are all read.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from cae2pipe.errors import Cae2pipeError

LONGEST_HEADER = 2**20
"""Largest extended header in bytes. They hold names and file attributes."""

BLOCK = tarfile.BLOCKSIZE

_DIGITS = re.compile(rb"\d{256}")
"""tarfile before Python 3.11.10 takes time quadratic in the length of such a run to search extended headers."""


class TarFormatError(Exception):
    """What is wrong with a tar; ``fix``: how to fix it, "" if only another copy helps."""

    def __init__(self, what: str, fix: str = ""):
        super().__init__(what)
        self.what, self.fix = what, fix


class TarMember(NamedTuple):
    """A member: its header, where its bytes begin in the file, and the number of its archive, starting at 0."""

    info: tarfile.TarInfo
    offset: int
    archive: int


def read_members(file: BinaryIO, start: int, size: int) -> Iterator[TarMember]:
    """Every member of the archives in ``size`` bytes of ``file``, starting at ``start``.

    Raises:
        TarFormatError: not a tar, a truncated or damaged one, a sparse member, or other data after its end.
    """
    begin: int | None = 0
    archive = 0
    while begin is not None:
        end = 0
        tar = _open(_Headers(file, start + begin, size - begin), at=start + begin, first=archive == 0)
        while (info := _next(tar)) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # a million of them would take a gigabyte
            if info.issparse():
                raise TarFormatError(f"{info.name!r} is stored as a sparse file", "pack it without --sparse")
            following: int = tar.offset
            stored = blocks(info.size) if info.isreg() else following - info.offset_data
            if info.size < 0 or info.offset < end or stored < 0 or following != info.offset_data + stored:
                raise TarFormatError(
                    f"the headers of {info.name!r} contradict each other at byte {start + begin + end}"
                )
            if info.isreg() and info.offset_data + info.size > size - begin:
                raise TarFormatError(f"the archive is truncated inside {info.name!r}")
            end = following
            yield TarMember(info, start + begin + info.offset_data, archive)
        begin = _following(file, start, begin + end, size=size)
        archive += 1


def blocks(size: int) -> int:
    """Size in a tar of a member of ``size`` bytes, padded to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class _Headers:
    """A part of a file for tarfile, which here only reads headers."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        self.position = position

    def read(self, count: int) -> bytes:
        if self.position < 0 or not 0 <= count <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {count} bytes")
        self.file.seek(self.start + self.position)
        data = self.file.read(min(count, max(0, self.size - self.position)))
        self.position += len(data)
        if count > BLOCK and _DIGITS.search(data):
            raise tarfile.ReadError("an extended header holds a number of more than 255 digits")
        return data


def _open(headers: _Headers, at: int, first: bool) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=cast(Any, headers), mode="r:", encoding="utf-8")
    except (OSError, MemoryError, Cae2pipeError):
        raise
    except Exception as error:  # tarfile raises ValueError, IndexError, RecursionError and others besides its own
        what = "this archive cannot be read" if first else f"the data after the archive's end at byte {at} is not a tar"
        raise TarFormatError(f"{what}: {error}") from None


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (OSError, MemoryError, Cae2pipeError):
        raise
    except Exception as error:
        raise TarFormatError(f"this archive cannot be read: {error}") from None


def _following(file: BinaryIO, start: int, end: int, *, size: int) -> int | None:
    """Where another archive begins after the one whose members end at ``end``; None if only zeros follow."""
    position = end
    while position < size:
        file.seek(start + position)
        data = file.read(min(2**20, size - position))
        if not data:
            break
        if rest := data.lstrip(b"\0"):
            begin = (position + len(data) - len(rest)) // BLOCK * BLOCK
            # An archive ends in two blocks of zeros. If one is missing, a header is damaged or overwritten.
            if begin - end < 2 * BLOCK:
                raise TarFormatError(f"the archive is damaged at byte {start + end}")
            return begin
        position += len(data)
    return None
