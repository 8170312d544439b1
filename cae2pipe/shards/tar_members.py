"""The members of tars by their headers, whatever those claim: no header makes this loop, or read what is not there.

What ``tarfile`` passes over in silence is an error here: a broken header, which it takes for the archive's end, and
contradictory sizes. Archives that lie one behind the other in a file, as ``cat a.tar b.tar`` joins them, are all read.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from cae2pipe.errors import Cae2pipeError

LONGEST_HEADER = 2**20
"""Bytes that an extended header may have. They hold names and file attributes."""

BLOCK = tarfile.BLOCKSIZE

_DIGITS = re.compile(rb"\d{256}")
"""tarfile before Python 3.11.10 searches extended headers in a time that grows with the square of such a run."""


class TarFormatError(Exception):
    """What is wrong with a tar; ``fix``: what helps, "" where only another copy does."""

    def __init__(self, what: str, fix: str = ""):
        super().__init__(what)
        self.what, self.fix = what, fix


class TarMember(NamedTuple):
    """A member: its header, where its bytes begin in the file, and the number of its archive, from 0 on."""

    info: tarfile.TarInfo
    offset: int
    archive: int


def read_members(file: BinaryIO, start: int, size: int) -> Iterator[TarMember]:
    """Every member of the archives in ``size`` bytes of ``file`` from ``start`` on.

    Raises:
        TarFormatError: no tar, one that is cut off or broken, a sparse member, or something else behind its end.
    """
    begin: int | None = 0
    archive = 0
    while begin is not None:
        end = 0
        tar = _open(_Headers(file, start + begin, size - begin), at=start + begin, first=archive == 0)
        while (info := _next(tar)) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # a million of them would weigh a gigabyte
            if info.issparse():
                raise TarFormatError(f"{info.name!r} is stored as a sparse file", "pack it plainly")
            following: int = tar.offset
            stored = blocks(info.size) if info.isreg() else following - info.offset_data
            if info.size < 0 or info.offset < end or stored < 0 or following != info.offset_data + stored:
                raise TarFormatError(
                    f"the headers of {info.name!r} contradict one another at byte {start + begin + end}"
                )
            if info.isreg() and info.offset_data + info.size > size - begin:
                raise TarFormatError(f"the archive is cut off inside {info.name!r}")
            end = following
            yield TarMember(info, start + begin + info.offset_data, archive)
        begin = _following(file, start, begin + end, size=size)
        archive += 1


def blocks(size: int) -> int:
    """Bytes that a member of ``size`` bytes takes in a tar."""
    return -(-size // BLOCK) * BLOCK


class _Headers:
    """A part of a file as tarfile sees it, which here reads headers alone."""

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
    except Exception as error:  # tarfile raises ValueError, IndexError, RecursionError and others beside its own
        what = "this archive cannot be read" if first else f"what follows the archive's end at byte {at} is no tar"
        raise TarFormatError(f"{what}: {error}") from None


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (OSError, MemoryError, Cae2pipeError):
        raise
    except Exception as error:
        raise TarFormatError(f"this archive cannot be read: {error}") from None


def _following(file: BinaryIO, start: int, end: int, *, size: int) -> int | None:
    """Where another archive begins behind the one whose members end at ``end``; None where only zeros follow."""
    position = end
    while position < size:
        file.seek(start + position)
        data = file.read(min(2**20, size - position))
        if not data:
            break
        if rest := data.lstrip(b"\0"):
            begin = (position + len(data) - len(rest)) // BLOCK * BLOCK
            # An archive ends in two blocks of zeros. Where one is missing a header is broken, or was.
            if begin - end < 2 * BLOCK:
                raise TarFormatError(f"the archive is broken at byte {start + end}")
            return begin
        position += len(data)
    return None
