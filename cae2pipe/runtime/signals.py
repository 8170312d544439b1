"""Ctrl-C, SIGTERM and SIGUSR1 during training: finish the step, write a checkpoint, then exit."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from cae2pipe.errors import Requeued, Terminated, WorkerError

T = TypeVar("T")


class StopRequest:
    """A pending request to stop: ``exception`` is None until a signal arrives."""

    exception: type[BaseException] | None = None


class StoppedWaitingError(WorkerError):
    """A stop was requested while waiting for an item."""


_current: list[StopRequest] = []
_raised: list[int] = []


def stop_asked() -> bool:
    """Whether a signal has arrived. For code that only waits, and has nothing to finish."""
    return any(request.exception is not None for request in _current)


def note_stop(number: int) -> None:
    """A signal is about to end the command with an exception, which may take seconds to get out of the work."""
    _raised.append(number)


def forget_stop() -> None:
    """The command has ended."""
    _raised.clear()


def stopping() -> str | None:
    """What to show while the work stops because of a signal; None while it does not."""
    if _raised:
        return "stopping"
    return "stopping after this step; Ctrl-C again stops at once" if stop_asked() else None


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Inside this block a first signal is only recorded; a second one takes effect at once.

    A failure of the workers together with a signal counts as that stop: workers have left the process group, but a
    scheduler may signal every process of a job; and waiting for an item ends in such a failure.
    """
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

    _current.append(request)
    old = {number: signal.signal(number, note) for number in kinds}
    try:
        yield request
    except WorkerError:
        if request.exception is None:
            raise
        raise request.exception from None
    finally:
        _current.remove(request)
        for number, handler in old.items():
            signal.signal(number, handler)


def until_stopped(items: Iterator[T], stop: StopRequest) -> Iterator[T]:
    """The items; after a signal they end if the workers fail or no item comes.

    Raises:
        The signal's exception, if one of several processes gets no item: the others may be in the middle of a step, and
        could not write a checkpoint with it.
    """
    try:
        yield from items
    except (RuntimeError, OSError, EOFError, WorkerError) as error:
        if stop.exception is None:
            raise
        distributed: Any = sys.modules.get("torch.distributed")
        if isinstance(error, StoppedWaitingError) and distributed and distributed.is_initialized():
            raise stop.exception from None
