"""Proof that images can be decoded, by worker processes. Imports little, so that those start at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from cae2pipe.errors import Cae2pipeError, ImageError, SourceError
from cae2pipe.images.decode import decode_rgb
from cae2pipe.processes import prepare_worker, worker_count

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
    pool = ProcessPoolExecutor(worker_count(workers), mp_context=context, initializer=prepare_worker)
    try:
        yield lambda paths: pool.map(check_image, paths, chunksize=CHUNK)
    except BrokenProcessPool:
        raise Cae2pipeError(
            "a worker process was killed, perhaps for lack of memory",
            fix="run the same command again with fewer --workers: what is finished is kept",
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
