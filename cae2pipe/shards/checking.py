"""Proof that images can be decoded, by worker processes. Imports little, so that those start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from cae2pipe.errors import Cae2pipeError, ImageError, SourceError
from cae2pipe.images.decode import decode_rgb

Check = Callable[[Sequence[Path]], Iterator[str | None]]
"""Paths in, ``check_image`` of each out, in order. Work on all of them begins at once."""

CHUNK = 16
"""Images that a worker is handed at a time."""


def check_image(path: Path) -> str | None:
    """Why an image cannot be decoded, or None.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        decode_rgb(read_file(path), where=path)
    except ImageError as error:
        return error.what
    return None


def read_file(path: Path) -> bytes:
    """A file of the source.

    Raises:
        SourceError: it cannot be read. Unlike an image that cannot be decoded, this may pass: it is no reject.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"this file cannot be read: {error.strerror}", where=path, fix="mend that, then run the same command again"
        ) from None


@contextmanager
def checking(workers: int) -> Iterator[Check]:
    """``check_image`` over many paths, in worker processes (-1: one a core; 0: none).

    Raises:
        Cae2pipeError: a worker was killed.
    """
    if workers == 0:
        yield lambda paths: map(check_image, paths)
        return
    # Not forkserver: there is one a process, and extraction starts it with its own modules loaded.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers if workers > 0 else _cores(), mp_context=context, initializer=_start_worker)
    try:
        yield lambda paths: pool.map(check_image, paths, chunksize=CHUNK)
    except BrokenProcessPool:
        raise Cae2pipeError(
            "a worker process was killed, perhaps for lack of memory",
            fix="run the same command again with fewer --workers: what is finished is kept",
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group: the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's workers wait for work for ever if the main process is killed outright.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
