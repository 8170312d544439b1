"""Worker processes that read images and check that they decode. Imports little, so that they start quickly."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from cae2pipe.artifacts.storage import read_bytes, read_range
from cae2pipe.errors import ImageError, SourceError
from cae2pipe.images.decode import check_decodes
from cae2pipe.runtime.processes import ahead, prepare_worker, refuse_import_of_main, shielded, worker_count, worker_died


class FileSlice(NamedTuple):
    """``size`` bytes of a file from ``offset`` on; ``member``: their name inside an archive, "" for a whole file."""

    file: Path
    offset: int
    size: int
    member: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}, member {self.member}" if self.member else str(self.file)


class Checked(NamedTuple):
    """An image's bytes, and the reason why they cannot be decoded, or None."""

    data: bytes
    reason: str | None


Check = Callable[[Iterable[FileSlice]], Iterator[Checked]]
"""``check_image`` of each piece, in order, working some images ahead of the caller."""

CHUNK = 8
"""Images that a worker gets at a time."""
AHEAD = 3
"""Chunks per worker that are read ahead; this bounds memory."""
GRACE = 2.0
"""Seconds for each worker of a broken pool to end."""


def check_image(piece: FileSlice) -> Checked:
    """Read an image and check that it decodes.

    Raises:
        SourceError: it cannot be read, or its size has changed since the source was scanned.
    """
    data = read_piece(piece)
    try:
        check_decodes(data, where=piece.where)
    except ImageError as error:
        return Checked(data, error.what)
    return Checked(data, None)


def read_piece(piece: FileSlice) -> bytes:
    """Read bytes of the source.

    Raises:
        SourceError: they cannot be read. This may be transient, so it is not a reject.
    """
    try:
        # A whole file is read to its end, to notice if it has grown.
        data = read_range(piece.file, piece.offset, piece.size) if piece.member else read_bytes(piece.file)
    except OSError as error:
        raise SourceError(
            f"this file cannot be read: {error.strerror or error}",
            where=piece.where,
            fix="fix its permissions or the storage, then run the same command again",
        ) from None
    if len(data) != piece.size:
        raise SourceError(
            f"this file has changed since the source was scanned: {len(data)} bytes instead of {piece.size}",
            where=piece.where,
            fix="do not change the source while it is packed; give a new output folder",
        )
    return data


@contextmanager
def checking(workers: int) -> Iterator[Check]:
    """``check_image`` over many pieces, in worker processes (-1: one per core; 0: none).

    Raises:
        WorkerError: a worker died.
    """
    if workers == 0:
        yield lambda pieces: map(check_image, pieces)
        return
    # Not forkserver: there is one per process, and extraction starts it with its own modules preloaded.
    context = multiprocessing.get_context("spawn")
    count = worker_count(workers)
    refuse_import_of_main()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=prepare_worker)
    processes: set[BaseProcess] = set()
    gave = False

    def checked(pieces: Iterable[FileSlice]) -> Iterator[Checked]:
        nonlocal gave
        for chunk in ahead(pool, _check_chunk, ((chunk,) for chunk in _chunks(pieces)), most=AHEAD * count):
            gave = True
            yield from chunk

    try:
        with shielded():
            # A task starts a worker only if none is idle, and one started later is neither shielded nor known here.
            while len(processes) < count:
                pool.submit(int)
                processes |= set(multiprocessing.active_children()) - others
        yield checked
    except BrokenProcessPool:
        raise worker_died(exit_code(processes), gave) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def exit_code(workers: Iterable[BaseProcess]) -> int | None:
    """The exit code of the worker that broke a pool, which then ends the others with SIGTERM. None if it is unknown."""
    codes = []
    deadline = time.monotonic() + GRACE
    for worker in workers:
        # The pool's thread waits for them too: what it has just collected has no exit code here for a moment.
        while worker.exitcode is None and time.monotonic() < deadline:
            worker.join(max(0.0, deadline - time.monotonic()))
        codes.append(worker.exitcode)
    own = [code for code in codes if code not in (None, 0, -signal.SIGTERM)]
    return next(iter(own), -signal.SIGTERM if -signal.SIGTERM in codes else None)


def _chunks(pieces: Iterable[FileSlice]) -> Iterator[list[FileSlice]]:
    remaining = iter(pieces)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _check_chunk(pieces: list[FileSlice]) -> list[Checked]:
    return [check_image(piece) for piece in pieces]
