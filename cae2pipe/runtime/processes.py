"""What all workers share: their number, how far ahead they work, their signals, and when they stop."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from cae2pipe.errors import WorkerError
from cae2pipe.runtime.ranks import torchrun_rank

T = TypeVar("T")

SOCKET_FOLDER = 70
"""Longest path of the temporary folder, in bytes: multiprocessing makes sockets below it, whose whole path may have
104 (macOS) to 108."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def worker_count(setting: int, most: int | None = None) -> int:
    """Processes for a ``workers`` setting: -1 is one per core that this process may use, at most ``most``. Ranks of one
    machine share its cores."""
    if setting >= 0:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // torchrun_rank().on_machine), most or cores)


def ahead(
    pool: Executor, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], *, most: int
) -> Generator[T, None, None]:
    """``function(*task)`` of every task, in order, with up to ``most`` started and not yet yielded."""
    pending: deque[Future[T]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, *task))
            if len(pending) >= most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def shielded() -> Iterator[None]:
    """Ctrl-C does not reach processes that are started inside the block, from their start; a Ctrl-C inside the
    block is raised at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Not ignored: another thread, in which it is not blocked, would take it and lose it.
    handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def shorten_sockets() -> None:
    """Make multiprocessing's sockets in a folder whose path is short enough, which TMPDIR may not be.

    Raises:
        OSError: no such folder exists.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_FOLDER:
        return
    long = tempfile.tempdir
    tempfile.tempdir = next((name for name in SHORT_FOLDERS if os.access(name, os.W_OK | os.X_OK)), None)
    if tempfile.tempdir is None:
        tempfile.tempdir = long
        raise OSError(errno.ENAMETOOLONG, "the path of this folder is too long for sockets (TMPDIR)", long)
    try:
        multiprocessing.util.get_temp_dir()  # decided once per process, and inherited
    finally:
        tempfile.tempdir = long


def refuse_import_of_main() -> None:
    """Raise WorkerError in a worker that is about to start workers, because it imports the script that started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkerError(
            "this script starts worker processes whenever it is imported, and each of them imports it",
            where=getattr(sys.modules.get("__mp_main__"), "__file__", None),
            fix='put the calls below `if __name__ == "__main__":`',
        )


def worker_died(exitcode: int | None, gave: bool) -> WorkerError:
    """The error for a worker process that ended. ``exitcode``: from multiprocessing, None if unknown; ``gave``:
    whether it had returned anything before."""
    fewer = "run the same command again with fewer --workers; finished work is kept"
    if exitcode == -signal.SIGBUS:
        return WorkerError(
            "a worker process was killed by SIGBUS: /dev/shm is full, or a file that it read was truncated",
            fix="look at `df /dev/shm` (`docker run --shm-size=...` or `--ipc=host` enlarges it), or " + fewer,
        )
    if exitcode is not None and exitcode >= 0 and not gave:
        return WorkerError(
            f"a worker process ended before it returned anything (exit code {exitcode})",
            fix='see its output above; a script that uses workers needs `if __name__ == "__main__":` around its '
            "calls, since workers import it",
        )
    if exitcode is None:
        fewer += '; a script needs `if __name__ == "__main__":` around its calls, since workers import it'
    by = f" by {signal.Signals(-exitcode).name}" if exitcode is not None and exitcode < 0 else ""
    memory = ", perhaps because memory ran out" if exitcode in (None, -signal.SIGKILL) else ""
    if exitcode is not None and exitcode >= 0:
        return WorkerError(
            f"a worker process ended by an error (exit code {exitcode})",
            fix="see its output above; then run the same command again; finished work is kept",
        )
    return WorkerError(f"a worker process was killed{by}{memory}", fix=fewer)


def prepare_worker() -> None:
    """Call this first in a worker process.

    Ctrl-C reaches the whole process group, and a worker that dies from it looks like a failure: only the main
    process decides what it means. SIGTERM is unchanged: an exiting interpreter stops remaining workers with it.
    A worker also ends if its main process was killed; otherwise it would wait for work forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
