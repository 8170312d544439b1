"""The entry point. It handles Ctrl-C and the standard streams before it imports anything else."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cae2pipe.errors import FAILURE, INTERRUPTED
from cae2pipe.runtime.signals import note_stop
from cae2pipe.runtime.streams import finish_streams, prepare_streams

if TYPE_CHECKING:
    from cae2pipe.commands.app import app as app


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        note_stop(number)
        raise KeyboardInterrupt

    code: int | str | None = FAILURE
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise ignored, as under nohup
            signal.signal(signal.SIGINT, note)
        prepare_streams()
        # Python's resource tracker, which cleans up after killed processes, would print warnings below the real error.
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.getenv("PYTHONWARNINGS"), "ignore:resource_tracker")))
        from cae2pipe.commands.app import app

        app()
    except SystemExit as left:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = left.code if left.code is None or isinstance(left.code, int) else FAILURE
        # Outside of a command typer catches Ctrl-C and prints nothing.
        if isinstance(getattr(left.__context__, "__cause__", None), KeyboardInterrupt):
            sys.stderr.write("interrupted\n")
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # An interrupted import may raise something else.
        if interrupts:
            sys.stderr.write("interrupted\n")
            code = INTERRUPTED
        else:
            code = _failed(error)
    if not finish_streams(error_shown=bool(code)):
        code = code or FAILURE
    sys.exit(code)


def _failed(error: BaseException) -> int:
    """Report an error from outside of a command, such as help that cannot be printed. A defect is raised again."""
    from cae2pipe.commands.shared import show_error
    from cae2pipe.runtime.system_errors import explain_system_error

    explained = explain_system_error(error)
    if explained is None:
        raise error
    if not explained.shown_elsewhere:
        show_error(explained)
    return explained.exit_code


def __getattr__(name: str) -> Any:
    if name == "app":
        from cae2pipe.commands.app import app

        return app
    raise AttributeError(name)
