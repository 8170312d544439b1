"""What all workers share: how many, how far ahead they work, which signals they heed, when they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from multiprocessing.connection import wait
from typing import Any, TypeVar

T = TypeVar("T")


def worker_count(setting: int, most: int | None = None) -> int:
    """Processes for a ``workers`` setting: -1 is one a core that this process may use, at most ``most``."""
    if setting >= 0:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, most or cores)


def ahead(
    pool: Executor, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], most: int
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


def prepare_worker() -> None:
    """To be called first in a worker process.

    Ctrl-C reaches the whole process group, and a worker that dies of it looks like a failure: the main process alone
    decides what it means. SIGTERM stays as it is: it is how an interpreter that exits ends workers that are left.
    A worker whose main process was killed outright ends too: left alone it would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
