"""Several processes of one command on one machine, each with its part of the work and a device of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from cae2pipe.artifacts.parts import Part
from cae2pipe.errors import BAD_INPUT, BadInputError, Cae2pipeError

Work = Callable[[Part, str | None], Any]
"""Does a part on a device (None: the command's own); picklable."""


def run_jobs(work: Work, jobs: int, device: str | None) -> None:
    """Do all parts of a work at once.

    Ctrl-C and SIGTERM are passed on; each process ends its step, writes its checkpoint and leaves.

    Raises:
        Cae2pipeError: a process failed; it has said itself of what.
    """
    # A clean interpreter each: fork would copy a CUDA context or a thread pool half-alive.
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for number in range(jobs):
            own = device or job_device(number)
            processes.append(context.Process(target=_run, args=(work, Part(number + 1, jobs), own)))
            processes[-1].start()
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise
    failed = [str(number) for number, process in enumerate(processes, 1) if process.exitcode]
    if failed:
        codes = {process.exitcode for process in processes if process.exitcode}
        kind = BadInputError if codes == {BAD_INPUT} else Cae2pipeError
        raise kind(
            f"{len(failed)} of {jobs} processes failed: {', '.join(failed)}",
            fix="mend what they said above; the same command goes on",
        )


def job_device(number: int) -> str | None:
    """A CUDA device for each process in turn; None where there is none."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else None


def _run(work: Work, part: Part, device: str | None) -> None:
    import typer

    from cae2pipe.commands.shared import exits
    from cae2pipe.processes import prepare_worker

    # Its end is the main process's to decide, by a signal that it passes on or by its own death. Ctrl-C reaches a
    # whole process group: with the signal passed on it would be the second one, which does not wait for a checkpoint.
    os.setsid()
    prepare_worker()
    code = 0
    try:
        with exits():
            work(part, device)
    except typer.Exit as error:
        code = error.exit_code
    # Not from within: the error's traceback holds the loader, whose workers end in good order only when it goes.
    sys.exit(code)
