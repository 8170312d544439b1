"""The loop of pretraining and of training on labels: steps, delayed reading of outcomes, checkpoints, orderly stops.

Only linear probes on cached features, which take minutes, have a loop of their own (``cae2pipe/evaluation/linear.py``).
"""

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
    """A training: its steps and its records. Every process makes all calls, in the same order."""

    metrics: MetricsFile | None
    """Writes in the leading process only."""

    def items(self) -> Iterator[Item]:
        """The input of each step, from the first step that is not done yet."""

    def step(self, item: Item, flags: Flags) -> Outcome:
        """Train on an item without waiting for the device; the flags are summed over processes."""

    def out_of_memory(self, item: Item, reason: str) -> OutOfMemoryError:
        """The error to raise if a step does not fit the device: it says what would fit. ``reason``: torch's message."""

    def settle(self, outcome: Outcome) -> Flags:
        """Wait for an outcome and record it. Raises DivergedError if it is not finite."""

    def ends_epoch(self, done: int) -> bool:
        """Whether ``end_epoch`` must be called after ``done`` steps."""

    def end_epoch(self, done: int) -> Flags:
        """End an epoch whose outcomes are all settled. Returns, the same in every process, whether to write a
        checkpoint and whether to stop."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that training resumes from; only those of the leading process are written."""


def run_steps(
    training: Training[Item, Outcome], start: int, limit: int, *, checkpoints: Checkpoints, world: World, report: Report
) -> int:
    """Run the steps from ``start`` to ``limit``. Returns the steps done.

    On a device the outcome of a step is read after the next one has started, so the device never waits for the host.
    Decisions that all processes share, to stop or to write a checkpoint, are part of the outcome. A requested stop
    (Ctrl-C, SIGTERM, SIGUSR1) takes effect after the current step, with a checkpoint.

    Raises:
        KeyboardInterrupt, Terminated, Requeued: as requested, in this or another process. DivergedError,
        OutOfMemoryError: from ``training``. CompileError: a step cannot be compiled. RuntimeError: there were too few
        items, which is a defect.
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
            # Metrics first: the lines of all steps before a checkpoint must be on disk.
            report.waits_for(f"the checkpoint of step {done}")
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
                # Outside the except block, where the failed pass would still hold its memory.
                raise training.out_of_memory(item, full)
            pending, late = (outcome, pending) if ahead else (None, outcome)
            flags = Flags() if late is None else training.settle(late)
            # A single process needs no agreement.
            stopping = flags.stop > 0 or (world.ranks == 1 and stop.exception is not None)
            due = flags.checkpoint_due > 0
            done += 1
            ends, last = training.ends_epoch(done), done == limit
            if pending is not None and (ends or last or stopping or due):
                training.settle(pending)
                pending = None
            if ends:
                ended = training.end_epoch(done)
                due |= ended.checkpoint_due > 0
                stopping |= ended.stop > 0
            if last or stopping or due:
                save()
            if last or stopping:
                break
            began = time.monotonic()
        # A signal to all processes of a job has ended the workers, so there are no more items.
        if pending is not None:
            training.settle(pending)
        if done > saved:
            save()
        if stopping or stop.exception:
            report.log(f"stopped after {done} steps; rerun the same command to resume")
            # Perhaps only another process received the signal.
            raise stop.exception or Terminated
        if done < limit:
            raise RuntimeError(f"the items ended after {done} of {limit} steps")
    return done


def runs_ahead(device: torch.device) -> bool:
    """Whether the device works asynchronously."""
    return device.type != "cpu"
