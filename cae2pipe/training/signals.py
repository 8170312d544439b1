"""Ctrl-C, SIGTERM and SIGUSR1 during training: finish the step, write a checkpoint, then leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cae2pipe.errors import Requeued, Terminated


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
