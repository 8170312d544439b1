"""Standard streams that are closed, full or of a small alphabet must not end a command, or only in good order."""

from __future__ import annotations

import io
import os
import sys
import threading
from contextlib import suppress
from typing import Any

STDOUT = "standard output"


def prepare_streams() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` such that names which they cannot print are escaped, that an error in
    writing to stdout says where it was, and one in writing to stderr, which only tells of the work, is passed over.
    """
    # What is opened next would get the number of a closed one, and with it all that is printed there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _opened(1, sys.stdout, False)
    sys.stderr = _opened(2, sys.stderr, True)
    sys.unraisablehook = _keep_interrupts


def finish_streams(error_shown: bool) -> bool:
    """Write out what is left; whether that went well. If not, the user is told of it, unless an error has been
    shown already."""
    with suppress(OSError):
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except OSError as error:
        if not error_shown:
            sys.stderr.write(f"error: {STDOUT} cannot be written: {error.strerror}\n")
        # The interpreter would try again as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


class _Stream(io.FileIO):
    def __init__(self, number: int, forgiving: bool):
        super().__init__(number, "w", closefd=False)
        self.forgiving = forgiving

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not self.forgiving:
                error.filename = STDOUT
                raise
            return len(memoryview(data).cast("B"))


def _opened(number: int, stream: Any, forgiving: bool) -> Any:
    if stream is not None and not (isinstance(stream, io.TextIOWrapper) and _descriptor(stream) == number):
        return stream  # somebody has put another one in its place
    raw = _Stream(number, forgiving)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=forgiving or raw.isatty(),
        write_through=bool(stream and stream.write_through),
    )


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except OSError:
        return None


def _keep_interrupts(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # It came where nothing can be raised, as in a destructor: again, where it can.
        if threading.main_thread().is_alive():
            import _thread

            _thread.interrupt_main()
        return
    sys.__unraisablehook__(unraisable)
