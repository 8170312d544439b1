"""What all commands share: common options, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from cae2pipe.artifacts.places import place as _place
from cae2pipe.errors import (
    FAILURE,
    INTERRUPTED,
    REQUEUE,
    TERMINATED,
    Cae2pipeError,
    OutOfMemoryError,
    Requeued,
    StorageError,
    Terminated,
)
from cae2pipe.names import visible
from cae2pipe.reporting.terminal import Terminal

console = Terminal()
errors = Terminal(stderr=True)


def place(text: str) -> Path:
    """A path or URL of the command line."""
    try:
        return _place(text)
    except Cae2pipeError as error:
        raise typer.BadParameter(visible(str(error), keep="\n")) from None


Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a setting; may be repeated.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes. Default: one a core.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder or URL to make, or to go on with.", parser=place)]


def show(error: Cae2pipeError) -> None:
    """Print an error as users see it."""
    errors.problem(error, "error:")


def host_memory() -> OutOfMemoryError:
    """The error to show where the machine's memory, not a device's, has run out."""
    return OutOfMemoryError(
        "this machine has run out of memory",
        fix="end what else uses it, use fewer --workers, where the command has them, or a smaller batch",
    )


@contextmanager
def exits() -> Iterator[None]:
    """Turn what a command raises into a message and an exit code; a defect of ours keeps its traceback."""

    kinds = {signal.SIGTERM: Terminated, signal.SIGUSR1: Requeued}

    def leave(number: int, frame: FrameType | None) -> None:
        raise kinds[signal.Signals(number)]

    old = {number: signal.signal(number, leave) for number in kinds}
    try:
        yield
    except Cae2pipeError as error:
        if not error.shown_elsewhere:
            show(error)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            show(host_memory())
            raise typer.Exit(FAILURE) from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = StorageError(
            f"the disk is full: {error.strerror}",
            where=error.filename,
            fix="free some space, then run the same command again: what is finished is kept",
        )
        show(what)
        raise typer.Exit(FAILURE) from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # torch's MemoryError
            show(host_memory())
            raise typer.Exit(FAILURE) from None
        # By its name: commands that need no torch do not wait for its import.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        show(
            OutOfMemoryError(
                f"the device has run out of memory: {str(error).splitlines()[0]}",
                fix="end what else uses the device (nvidia-smi lists it), or choose another one: --device, where the "
                "command has it, or CUDA_VISIBLE_DEVICES",
            )
        )
        raise typer.Exit(FAILURE) from None
    except MemoryError:
        show(host_memory())
        raise typer.Exit(FAILURE) from None
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        errors.print("terminated; the same command goes on from here")
        raise typer.Exit(TERMINATED) from None
    except Requeued:
        errors.print("asked to leave; the same command goes on from here")
        raise typer.Exit(REQUEUE) from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def section(section: str, /, **values: Any) -> dict[str, Any]:
    """The options that were given, as raw settings: ``{section: {...}}``, or {} where none was."""
    given = {key: value for key, value in values.items() if value is not None}
    return {section: given} if given else {}
