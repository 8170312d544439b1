"""Several processes of one command on one machine, each with its own share of the work and its own device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.errors import BAD_INPUT, BadInputError, Cae2pipeError, Requeued, Terminated
from cae2pipe.runtime.processes import shielded

Work = Callable[[WorkShare, str | None], Any]
"""Does one share of the work on a device (None: the command's own). Must be picklable."""


def run_jobs(work: Work, jobs: int, device: str | None) -> None:
    """Do all shares of the work at once.

    Ctrl-C and SIGTERM are passed on; each process finishes its step, writes its checkpoint and exits.

    Raises:
        Cae2pipeError: a process failed, and has printed why.
    """
    # A clean interpreter for each: fork would copy a CUDA context or a thread pool in a broken state.
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for number in range(jobs):
            own = device or job_device(number)
            process: BaseProcess = context.Process(target=_run, args=(work, WorkShare(number + 1, jobs), own))
            with shielded():
                process.start()
                processes.append(process)
        for process in processes:
            process.join()
    except BaseException:
        _end(processes)
        raise
    if any(process.exitcode for process in processes):
        raise failure([process.exitcode or 0 for process in processes])


def failure(codes: list[int]) -> Cae2pipeError:
    """The error for the exit codes of all processes, some of which are not 0. A negative code is a signal, and that
    process could print nothing."""
    failed = {number: code for number, code in enumerate(codes, 1) if code}
    killed = any(code < 0 for code in failed.values())
    names = ", ".join(
        f"{number} (killed by {signal.Signals(-code).name})" if code < 0 else str(number)
        for number, code in failed.items()
    )
    said = "" if all(code < 0 for code in failed.values()) else "fix the errors above; "
    memory = "if memory ran out, use fewer --jobs or --workers; " if killed else ""
    kind = BadInputError if set(failed.values()) == {BAD_INPUT} else Cae2pipeError
    return kind(
        f"{len(failed)} of {len(codes)} processes failed: {names}",
        fix=f"{said}{memory}then rerun the same command to resume",
    )


def _end(processes: list[BaseProcess]) -> None:
    """Stop the processes and wait for them. A second Ctrl-C or SIGTERM is passed on, so that they stop at once."""
    while True:
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
        except (KeyboardInterrupt, Terminated, Requeued):
            continue
        return


def job_device(number: int) -> str | None:
    """A CUDA device for each process in turn; None where there is none."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else None


def _run(work: Work, part: WorkShare, device: str | None) -> None:
    import typer

    from cae2pipe.commands.shared import exits
    from cae2pipe.runtime.processes import prepare_worker
    from cae2pipe.runtime.streams import prepare_streams

    # The main process decides when this one stops: by a signal that it passes on, or by its own death. Ctrl-C reaches
    # the whole process group; the signal passed on would then be a second one, which does not wait for a checkpoint.
    os.setsid()
    prepare_worker()
    prepare_streams()
    code = 0
    try:
        with exits():
            work(part, device)
    except typer.Exit as error:
        code = error.exit_code
    # Not inside: the error's traceback keeps the loader alive, whose workers only stop cleanly when it is freed.
    sys.exit(code)
