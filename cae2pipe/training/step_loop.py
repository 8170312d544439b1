"""The loop of all training: steps, outcomes read behind them, checkpoints, and stops in good order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch

from cae2pipe.errors import OutOfMemoryError, Terminated
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.signals import deferred_stop, until_stopped
from cae2pipe.runtime.world import World
from cae2pipe.training.checkpoint import Checkpoints
from cae2pipe.training.compilation import compiler_advice
from cae2pipe.training.metrics import MetricsFile
from cae2pipe.training.step import Flags

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Training(Protocol[Item, Outcome]):
    """What is trained, and what is told of it. Every process calls all of it, in the same order."""

    metrics: MetricsFile | None
    """In the leading process."""

    def items(self) -> Iterator[Item]:
        """What each step takes, from the first that is not done yet."""

    def step(self, item: Item, flags: Flags) -> Outcome:
        """Train on an item, without a wait for the device; the flags are added up over processes."""

    def out_of_memory(self, item: Item, reason: str) -> OutOfMemoryError:
        """The error to raise where a step did not fit the device: it says what would. ``reason``: what torch said."""

    def settle(self, outcome: Outcome) -> Flags:
        """Wait for an outcome, and tell of it. Raises DivergedError where it is not finite."""

    def ends_epoch(self, done: int) -> bool:
        """Whether ``end_epoch`` is to be called after that many steps."""

    def end_epoch(self, done: int) -> bool:
        """Close an epoch whose outcomes are all settled. Gives whether to write a checkpoint."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that training resumes from; only the leading process's are written."""


def run_steps(
    training: Training[Item, Outcome], start: int, limit: int, *, checkpoints: Checkpoints, world: World, report: Report
) -> int:
    """Steps from ``start`` to ``limit``. Returns the steps done.

    On a device the outcome of a step is read when the next one has been begun, so that it never waits for the host.
    What the processes must agree on, to stop or to write a checkpoint, travels with the outcome. A stop that is asked
    for (Ctrl-C, SIGTERM, SIGUSR1) comes after the step that is being done, with a checkpoint.

    Raises:
        KeyboardInterrupt, Terminated, Requeued: as was asked for, here or of another process. DivergedError,
        OutOfMemoryError: as ``training`` has them. CompileError: a step cannot be compiled.
    """
    ahead = runs_ahead(world.device)
    pending: Outcome | None = None
    stopping = False
    done = saved = start
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved, saved_at
        state = training.state()
        if training.metrics:
            # Metrics first: a checkpoint must never be ahead of the lines it promises.
            training.metrics.sync()
            checkpoints.save(done, state)
        saved, saved_at = done, time.monotonic()

    with deferred_stop() as stop:
        items = until_stopped(training.items() if start < limit else iter(()), stop)
        began = time.monotonic()
        for item in items:
            now = time.monotonic()
            overdue = world.is_main and now - saved_at > 60 * checkpoints.minutes
            flags = Flags(waited=now - began, stop=stop.exception is not None, checkpoint_due=overdue)
            full: str | None = None
            try:
                with compiler_advice():
                    outcome = training.step(item, flags)
            except torch.OutOfMemoryError as error:
                full = str(error)
            if full is not None:
                # Not where it is caught: there the failed pass still holds its memory.
                raise training.out_of_memory(item, full)
            pending, late = (outcome, pending) if ahead else (None, outcome)
            flags = Flags() if late is None else training.settle(late)
            # Alone there is nobody to agree with.
            stopping = flags.stop > 0 or (world.ranks == 1 and stop.exception is not None)
            due = flags.checkpoint_due > 0
            done += 1
            ends, last = training.ends_epoch(done), done == limit
            if pending is not None and (ends or last or stopping or due):
                training.settle(pending)
                pending = None
            due |= ends and training.end_epoch(done)
            if last or stopping or due:
                save()
            if last or stopping:
                break
            began = time.monotonic()
        # A signal to all processes of a job has ended the workers, and with them the items.
        if pending is not None:
            training.settle(pending)
        if done > saved:
            save()
        if stopping or stop.exception or done < limit:
            report.log(f"stopped after {done} steps; the same command goes on from there")
            # Another process may have been told, and not this one.
            raise stop.exception or Terminated
    return done


def runs_ahead(device: torch.device) -> bool:
    """Whether work is only begun when it is asked for, and done later."""
    return device.type != "cpu"
