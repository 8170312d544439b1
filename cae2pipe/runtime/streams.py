"""Standard streams that are closed, full or not UTF-8 must not crash a command."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from contextlib import suppress
from typing import Any, TextIO

STDOUT = "standard output"


def prepare_streams() -> None:
    """Prepare ``sys.stdout`` and ``sys.stderr``: names that they cannot print are escaped, an error in writing to
    stdout says so, and one in writing to stderr, which only shows progress, is ignored.
    """
    # The next opened file would get the number of a closed stream, and with it everything printed there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _opened(1, sys.stdout, False)
    sys.stderr = _opened(2, sys.stderr, True)
    sys.unraisablehook = _keep_interrupts


def forgiving(stream: TextIO) -> TextIO:
    """A stream to the same file or terminal, for progress: errors in writing to it are ignored, also those that the
    interpreter would meet again at its exit. A stream without a file is returned as it is."""
    number = _descriptor(stream)
    if number is None:
        return stream
    raw = io.BufferedWriter(_Stream(number, forgiving=True))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def finish_streams(error_shown: bool) -> bool:
    """Flush the streams; returns whether that succeeded. If not, the user is told, unless an error has been shown
    already, or the program that reads stdout has ended, as ``head`` does."""
    with suppress(OSError):
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except OSError as error:
        if not error_shown and error.errno != errno.EPIPE:
            sys.stderr.write(f"error: {STDOUT} cannot be written: {error.strerror}\n")
        # The interpreter would try again at exit.
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
        return stream  # it has been replaced, as by a test
    raw = _Stream(number, forgiving)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=forgiving or raw.isatty(),
        write_through=bool(stream and stream.write_through),
    )


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, AttributeError):
        return None


def _keep_interrupts(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # It arrived where nothing can be raised, as in a destructor: raise it again later.
        if threading.main_thread().is_alive():
            import _thread

            _thread.interrupt_main()
        return
    sys.__unraisablehook__(unraisable)
