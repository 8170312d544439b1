"""The loop of supervised training: steps of chunks, validation between epochs, checkpoints, and stops in good order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cae2pipe.artifacts.box import ScoresBox
from cae2pipe.errors import DivergedError, Terminated
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.signals import deferred_stop, until_stopped
from cae2pipe.runtime.upload import pinned
from cae2pipe.runtime.workers import in_order
from cae2pipe.runtime.world import World
from cae2pipe.supervised.course import Chunk, Course, Reader
from cae2pipe.supervised.remedies import Trained, chunk_remedy
from cae2pipe.training.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from cae2pipe.training.compilation import compiler_advice
from cae2pipe.training.metrics import MetricsFile
from cae2pipe.training.step import to_host

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"


class Learner(Protocol):
    """What is trained."""

    def step(self, chunks: list[Chunk], step: int, size: int) -> Tensor:
        """Train on this process's chunks of a step of ``size`` images, which lie on the host, pinned where they are to
        go to CUDA; gives the sum of their losses over ``size``, on the device. Gradients are exchanged within."""

    def rate(self, step: int) -> float:
        """The learning rate of a step."""

    def validate(self, epoch: int) -> dict[str, float] | None:
        """Figures after an epoch, or None where it is not scored; called by all processes."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that ``restore`` goes on from."""

    def restore(self, state: dict[str, Any]) -> None: ...


def train(
    learner: Learner,
    course: Course,
    reading: Callable[[int], Reader],
    root: Path,
    settings: Trained,
    world: World,
    report: Report,
) -> list[dict[str, Any]]:
    """Train to the end of the course, from the newest checkpoint below ``root`` if there is one.

    ``reading`` makes the reader of this process's chunks from a step on. A stop that is asked for (Ctrl-C, SIGTERM,
    SIGUSR1) comes after the step that is being done, with a checkpoint.

    Returns:
        A line for every epoch: its mean loss, and what ``validate`` gave.

    Raises:
        DivergedError: a loss is not finite. OutOfMemoryError: a chunk does not fit the device. CompileError: it cannot
        be compiled. SourceError, DamageError: as ``ChunkReader``.
    """
    folder, speed = root / CHECKPOINTS, settings.speed
    state: dict[str, Any] | None = None
    owner = ""

    def newest() -> int:
        nonlocal state, owner
        owner = ScoresBox.open(root).fingerprint
        like = {"learner": learner.state(), "record": {"history": [], "losses": []}}
        state = load_checkpoint(folder, report, owner, like)
        return state["step"] if state else 0

    start: int = world.lead(newest)
    record = Record(course, learner, root, start, world, report)
    if start:
        state = state or read_checkpoint(folder, start)
        learner.restore(state["learner"])
        record.restore(state["record"])
        state = None
        report.log(f"going on from step {start} of {course.total}")

    def checkpoint(done: int) -> None:
        if world.leads:
            record.sync()
            save_checkpoint(folder, done, {"learner": learner.state(), "record": record.state()}, owner, speed.keep)

    # On a device a step is only begun when it is called: its figures are read when the next one has been begun.
    ahead = world.device.type == "cuda"
    pending: Figures | None = None
    reader = reading(start)
    saved_at = time.monotonic()
    with closing(record), deferred_stop() as stop:
        workers = min(worker_count(speed.workers), len(reader))
        items = pinned(in_order(reader, workers, preload=[type(reader).__module__]), world.device)
        chunks = until_stopped(items if start < course.total else iter(()), stop)
        for step in range(start, course.total):
            taken = list(islice(chunks, len(reader.own)))
            if len(taken) < len(reader.own):
                # The same signal has ended the workers.
                if pending:
                    record.settle(pending)
                if step > start:
                    checkpoint(step)
                raise stop.exception or Terminated
            record.name_rejects(reader.root, taken)
            try:
                with compiler_advice():
                    loss = learner.step(taken, step, course.size(step)).detach().float()
            except torch.OutOfMemoryError:
                most = max((len(chunk.labels) for chunk in taken), default=0)
                remedy = chunk_remedy(settings, most, world.ranks, begun=any(folder.glob("*")))
                with memory_advice(f"a chunk of {most} images", remedy, f"step {step}"):
                    raise
            overdue = world.leads and time.monotonic() - saved_at > 60 * speed.checkpoint_minutes
            flags = [torch.full((), float(flag), device=loss.device) for flag in (stop.exception is not None, overdue)]
            figures = Figures(step, *to_host(world.sum(torch.stack([loss, *flags]))), time.monotonic())
            late, pending = (pending, figures) if ahead else (figures, None)
            stopping, due = record.settle(late) if late else (False, False)
            # Alone there is nobody to agree with.
            stopping |= world.ranks == 1 and stop.exception is not None
            ends = course.ends_epoch(step)
            if pending and (ends or stopping or due):
                record.settle(pending)
                pending = None
            scored = ends and record.end_epoch(course.epoch(step))
            if stopping or due or scored or step + 1 == course.total:
                checkpoint(step + 1)
                saved_at = time.monotonic()
            if stopping:
                report.log(f"stopped after {step + 1} steps; the same command goes on from there")
                # Another process may have been told, and not this one.
                raise stop.exception or Terminated
        if stop.exception:
            # It came while the last checkpoint was written.
            raise stop.exception
    return record.history


@dataclass(frozen=True)
class Figures:
    """What a step gave, perhaps still on its way to the host: loss, whether to stop, whether to write a checkpoint."""

    step: int
    values: Tensor
    arrived: torch.cuda.Event | None
    at: float


class Record:
    """What is written down and told of a training: a line a step, a line an epoch."""

    def __init__(self, course: Course, learner: Learner, root: Path, start: int, world: World, report: Report):
        self.course, self.learner, self.report = course, learner, report
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.metrics = MetricsFile(root / METRICS, start, report) if world.leads else None
        self.named: set[str] = set()
        self.last = time.monotonic()
        report.total(course.total, "steps", done=start)

    def state(self) -> dict[str, Any]:
        return {"history": self.history, "losses": self.losses}

    def restore(self, state: dict[str, Any]) -> None:
        self.history, self.losses = state["history"], state["losses"]

    def name_rejects(self, root: Path, chunks: list[Chunk]) -> None:
        """Log images that cannot be decoded, once each."""
        for reject in (reject for chunk in chunks for reject in chunk.rejected if reject["path"] not in self.named):
            self.named.add(reject["path"])
            self.report.log(f"another image takes the place of {root / reject['path']}: {reject['reason']}")

    def settle(self, figures: Figures) -> tuple[bool, bool]:
        """Read a step's figures and tell of them. Gives whether to stop, and whether a checkpoint is due."""
        if figures.arrived:
            figures.arrived.synchronize()
        loss, stopping, due = figures.values.tolist()
        step, epoch = figures.step, self.course.epoch(figures.step)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is not finite at step {step}, in epoch {epoch}",
                where="lr",
                fix="lower lr, and give another output folder",
            )
        self.losses.append(loss)
        rate, lr = self.course.size(step) / (figures.at - self.last), self.learner.rate(step)
        self.last = figures.at
        if self.metrics:
            self.metrics.write({"step": step, "epoch": epoch, "loss": loss, "lr": lr, "images_per_s": round(rate, 2)})
        self.report.advance(1, loss=loss, lr=lr, epoch=epoch, images_per_s=rate)
        return stopping > 0, due > 0

    def end_epoch(self, epoch: int) -> bool:
        """Close an epoch; whether it was scored."""
        line = {"epoch": epoch, "loss": sum(self.losses) / len(self.losses)}
        self.losses = []
        found = self.learner.validate(epoch)
        self.history.append({**line, **(found or {})})
        if found:
            self.report.log("  ".join([f"epoch {epoch}", *(f"{name} {value:.4f}" for name, value in found.items())]))
        self.last = time.monotonic()
        return found is not None

    def sync(self) -> None:
        if self.metrics:
            self.metrics.sync()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
