"""Ctrl-C, SIGTERM and SIGUSR1 during training: finish the step, write a checkpoint, then leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from cae2pipe.errors import Requeued, Terminated, WorkerError

T = TypeVar("T")


class StopRequest:
    """What has been asked for so far: ``exception`` is None until a signal arrives."""

    exception: type[BaseException] | None = None


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Within this block a first signal is only noted; a second one acts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    kinds: dict[int, type[BaseException]] = {
        signal.SIGINT: KeyboardInterrupt,
        signal.SIGTERM: Terminated,
        signal.SIGUSR1: Requeued,
    }

    def note(number: int, frame: FrameType | None) -> None:
        if request.exception is not None:
            raise kinds[number]
        request.exception = kinds[number]

    old = {number: signal.signal(number, note) for number in kinds}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def until_stopped(items: Iterator[T], stop: StopRequest) -> Iterator[T]:
    """The items; a failure of the workers that comes with a signal is the stop that was asked for.

    Workers have left the process group, but a scheduler may signal every process of a job.
    """
    try:
        yield from items
    except (RuntimeError, OSError, EOFError, WorkerError):
        if stop.exception is None:
            raise
