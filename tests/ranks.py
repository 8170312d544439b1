"""Processes with preloaded imports: victims of faults, and ranks as torchrun would start them.

A launch of torchrun imports torch three times, which takes most of a small test's time. torchrun's own work (its
command line, and ending all ranks if one fails) is covered by the tests that start it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOAD = [
    "cae2pipe.commands.app",
    "cae2pipe.supervised.loop",
    "cae2pipe.stages.compare",
    "cae2pipe.stages.repair",
    "open_clip",
    "timm",
    "torch.distributed.fsdp",
    "tests.freeze_imports",
]
_ready: list[ForkServerContext] = []


def imported() -> ForkServerContext:
    """A multiprocessing context whose processes have ``PRELOAD`` imported."""
    if not _ready:
        context = multiprocessing.get_context("forkserver")
        # There is one server per process, and an earlier test's data loader may have started it with its own modules
        # only.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        context.set_forkserver_preload(PRELOAD)
        _ready.append(context)
    return _ready[0]


@dataclass(frozen=True)
class Done:
    """Exit codes and output of all ranks."""

    codes: list[int | None]
    stdout: str
    stderr: str


def launch(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> Done:
    """Run ``function(*arguments)`` in each rank, with torchrun's environment."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        processes = [
            imported().Process(
                target=_rank,
                args=(shared | {name: str(rank) for name in ("RANK", "LOCAL_RANK")}, Path(folder), function, arguments),
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        output = (
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{name}"))) for name in ("out", "err")
        )
        return Done([process.exitcode for process in processes], *output)


def command(*arguments: object, ranks: int = 2) -> Done:
    """``cae2pipe ARGUMENTS`` in each rank."""
    return launch(_command, [str(argument) for argument in arguments], ranks=ranks)


def _command(arguments: list[str]) -> None:
    from cae2pipe.cli import app

    app(arguments)


def _rank(env: dict[str, str], folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= env
    for number, name in ((1, "out"), (2, "err")):
        with (folder / f"{env['RANK']}.{name}").open("w") as file:
            os.dup2(file.fileno(), number)
    function(*arguments)
