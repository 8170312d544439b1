"""What all commands share: common options, and the messages and exit codes of errors."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from cae2pipe.artifacts.storage import is_shared, to_local_path, to_path
from cae2pipe.errors import (
    INTERRUPTED,
    REQUEUE,
    TERMINATED,
    BadInputError,
    Cae2pipeError,
    Requeued,
    Terminated,
)
from cae2pipe.runtime.foreign_names import visible, why_not_utf8
from cae2pipe.runtime.signals import forget_stop, note_stop
from cae2pipe.runtime.system_errors import explain_system_error
from cae2pipe.runtime.terminal import Terminal

console = Terminal()
errors = Terminal(stderr=True)


def path_or_url(text: str | Path) -> Path:
    """A path or URL of the command line. typer also passes defaults through it, which are paths already."""
    return _path(text, to_path)


def local_path(text: str | Path) -> Path:
    """A path of the command line that cannot be remote."""
    return _path(text, to_local_path)


def folder_or_url(text: str | Path) -> Path:
    """A folder or URL of the command line to write to."""
    return _path(_writable_name(text), _lasting)


def _lasting(text: str | Path) -> Path:
    path = to_path(text)
    if not is_shared(path):
        raise BadInputError(
            "what is written here is lost when the command ends", where=text, fix="give a folder, or the URL of a store"
        )
    return path


def local_folder(text: str | Path) -> Path:
    """A local folder of the command line to write to."""
    return _path(_writable_name(text), partial(to_local_path, output=True))


def _path(text: str | Path, convert: Callable[[str | Path], Path]) -> Path:
    if not str(text).strip():
        raise typer.BadParameter("this name is empty; perhaps a shell variable is not set")
    try:
        return convert(text)
    except Cae2pipeError as error:
        raise typer.BadParameter(visible(str(error), keep="\n")) from None


def _writable_name(text: str | Path) -> str | Path:
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("; ".join(why_not_utf8(str(text)))) from None
    return text


Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a setting (repeatable).")]
Workers = Annotated[int | None, typer.Option(help="Worker processes (default: one per core).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Output folder or URL (created, or resumed if it exists).", parser=folder_or_url
    ),
]
LocalOut = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Output folder, not a URL (created, or resumed if it exists).", parser=local_folder
    ),
]


Pixels = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Of a target set by reference: the folder (or URL) with its pixels.",
        parser=path_or_url,
    ),
]


STOPS = {
    KeyboardInterrupt: ("interrupted", INTERRUPTED),
    Terminated: ("terminated", TERMINATED),
    Requeued: ("SIGUSR1 received", REQUEUE),
}
"""What a stopped command prints, and its exit code."""


def show_error(error: Cae2pipeError) -> None:
    """Print an error as users see it."""
    errors.problem(error, "error:")


@contextmanager
def exits() -> Iterator[None]:
    """Turn a command's errors into a message and an exit code. A defect of cae2pipe keeps its traceback."""

    kinds = {signal.SIGTERM: Terminated, signal.SIGUSR1: Requeued}

    def leave(number: int, frame: FrameType | None) -> None:
        note_stop(number)
        raise kinds[signal.Signals(number)]

    old: dict[int, Any] = {number: signal.signal(number, leave) for number in kinds}

    def left(code: int) -> typer.Exit:
        # A further signal could only disturb the exit.
        for number in (signal.SIGINT, *kinds):
            old.setdefault(number, signal.getsignal(number))
            signal.signal(number, signal.SIG_IGN)
        return typer.Exit(code)

    try:
        yield
    except (KeyboardInterrupt, Terminated, Requeued) as asked:
        what, code = STOPS[type(asked)]
        end = left(code)
        errors.print(f"{what}; rerun the same command to resume")
        raise end from None
    except Exception as error:
        explained = error if isinstance(error, Cae2pipeError) else explain_system_error(error)
        if explained is None:
            raise
        if not explained.shown_elsewhere:
            show_error(explained)
        raise typer.Exit(explained.exit_code) from None
    finally:
        forget_stop()
        for number, handler in old.items():
            signal.signal(number, handler)
