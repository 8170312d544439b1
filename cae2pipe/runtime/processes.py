"""What all workers share: how many, how far ahead they work, which signals they heed, when they end."""

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

T = TypeVar("T")

SOCKET_FOLDER = 70
"""Bytes that the folder of temporary files may have: below it multiprocessing makes sockets, whose whole path may have
104 (macOS) to 108."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def worker_count(setting: int, most: int | None = None) -> int:
    """Processes for a ``workers`` setting: -1 is one a core that this process may use, at most ``most``."""
    if setting >= 0:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, most or cores)


def ahead(
    pool: Executor, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], *, most: int
) -> Generator[T, None, None]:
    """``function(*task)`` of every task, in order, with up to ``most`` begun and not yet given out."""
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
    """Processes that are started within are not reached by Ctrl-C, from their first moment on; one that comes
    meanwhile is raised at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def shorten_sockets() -> None:
    """Have multiprocessing make its sockets in a folder whose name is short enough; TMPDIR may name one that is not.

    Raises:
        OSError: there is none.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_FOLDER:
        return
    long = tempfile.tempdir
    tempfile.tempdir = next((name for name in SHORT_FOLDERS if os.access(name, os.W_OK | os.X_OK)), None)
    if tempfile.tempdir is None:
        tempfile.tempdir = long
        raise OSError(errno.ENAMETOOLONG, "the name of this folder is too long for sockets (TMPDIR)", long)
    try:
        multiprocessing.util.get_temp_dir()  # decided once a process, and handed down
    finally:
        tempfile.tempdir = long


def refuse_import_of_main() -> None:
    """Raise WorkerError in a worker that is about to start workers: it imports the script that has started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkerError(
            "this script starts worker processes whenever it is imported, and each of them imports it",
            where=getattr(sys.modules.get("__mp_main__"), "__file__", None),
            fix='put what starts them below `if __name__ == "__main__":`',
        )


def worker_died(exitcode: int | None, gave: bool) -> WorkerError:
    """What to raise where a worker process is gone. ``exitcode``: as multiprocessing has it, None where nobody knows;
    ``gave``: whether it had done anything before."""
    fewer = "run the same command again with fewer --workers: what is finished is kept"
    if exitcode == -signal.SIGBUS:
        return WorkerError(
            "a worker process was killed by SIGBUS: no room was left in /dev/shm, or a file that it read was cut off",
            fix="look at `df /dev/shm` (`docker run --shm-size=...` or `--ipc=host` makes it larger), or " + fewer,
        )
    if exitcode is not None and exitcode >= 0 and not gave:
        return WorkerError(
            f"a worker process ended before it gave anything (exit code {exitcode})",
            fix='see what it said above; a script that uses workers needs `if __name__ == "__main__":` around what '
            "it does, since they import it",
        )
    if exitcode is None:
        fewer += '; a script needs `if __name__ == "__main__":` around what uses workers, since they import it'
    by = f" by {signal.Signals(-exitcode).name}" if exitcode is not None and exitcode < 0 else ""
    memory = ", perhaps for lack of memory" if exitcode in (None, -signal.SIGKILL) else ""
    if exitcode is not None and exitcode >= 0:
        return WorkerError(f"a worker process ended (exit code {exitcode})", fix=fewer)
    return WorkerError(f"a worker process was killed{by}{memory}", fix=fewer)


def prepare_worker() -> None:
    """To be called first in a worker process.

    Ctrl-C reaches the whole process group, and a worker that dies of it looks like a failure: the main process alone
    decides what it means. SIGTERM stays as it is: it is how an interpreter that exits ends workers that are left.
    A worker whose main process was killed outright ends too: left alone it would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
