"""Supervised training for ``step_loop``: steps of chunks, validation between epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import ScoresArtifact
from cae2pipe.errors import DivergedError, OutOfMemoryError
from cae2pipe.runtime.device_memory import out_of_memory
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.upload import pinned
from cae2pipe.runtime.workers import in_order
from cae2pipe.runtime.world import World
from cae2pipe.supervised.remedies import Trained, chunk_remedy
from cae2pipe.supervised.schedule import Chunk, Reader, TrainSchedule
from cae2pipe.training.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from cae2pipe.training.metrics import METRICS_FILE, MetricsFile
from cae2pipe.training.step import Flags, on_host, to_host
from cae2pipe.training.step_loop import run_steps


class Learner(Protocol):
    """What supervised training trains."""

    def step(self, chunks: list[Chunk], step: int, size: int) -> Tensor:
        """Train on this process's chunks of a step of ``size`` images. The chunks are on the host, in pinned memory if
        the device is CUDA. Returns the sum of their losses divided by ``size``, on the device. Exchanges gradients."""

    def rate(self, step: int) -> float:
        """The learning rate of a step."""

    def validates(self, epoch: int) -> bool:
        """Whether an epoch is followed by ``validate``."""

    def validate(self, epoch: int) -> dict[str, float]:
        """Scores after an epoch; called by all processes."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that ``restore`` takes."""

    def restore(self, state: dict[str, Any]) -> None: ...


def train(
    learner: Learner,
    schedule: TrainSchedule,
    reading: Callable[[int], Reader],
    *,
    root: Path,
    settings: Trained,
    world: World,
    report: Report,
) -> list[dict[str, Any]]:
    """Train to the end of the schedule, from the newest checkpoint below ``root`` if there is one.

    ``reading`` makes the reader of this process's chunks from a step on. Stops are handled as in ``run_steps``.

    Returns:
        One line per epoch: its mean loss, and the result of ``validate``.

    Raises:
        DivergedError: a loss is not finite. OutOfMemoryError: a chunk does not fit the device. CompileError: a step
        cannot be compiled. SourceError, DamageError: as ``ChunkReader``.
    """
    owner: str = world.run_on_main(lambda: ScoresArtifact.open(root).fingerprint)
    speed = settings.speed
    checkpoints = Checkpoints(root / CHECKPOINTS_FOLDER, owner, speed.keep, minutes=speed.checkpoint_minutes)
    training = Supervised(learner, schedule, root, settings=settings, world=world, report=report)
    start = checkpoints.resume(training.state, training.restore, world, report=report)
    with closing(training):
        training.begin(reading(start), start)
        if start:
            report.log(f"resuming from step {start} of {schedule.total}")
        run_steps(training, start, schedule.total, checkpoints=checkpoints, world=world, report=report)
    return training.history


class Figures(NamedTuple):
    """The results of a step, perhaps still on their way to the host: the loss, then the flags."""

    step: int
    values: Tensor
    arrived: torch.cuda.Event | None
    at: float


class Supervised:
    """Steps of chunks, with one line per step and one per epoch; a ``step_loop.Training``.

    Args:
        root: the folder of metrics and checkpoints.
    """

    reader: Reader
    metrics: MetricsFile | None = None

    def __init__(
        self, learner: Learner, schedule: TrainSchedule, root: Path, *, settings: Trained, world: World, report: Report
    ):
        self.learner, self.schedule, self.root = learner, schedule, root
        self.settings, self.world, self.report = settings, world, report
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.named: set[str] = set()

    def state(self) -> dict[str, Any]:
        return {"learner": self.learner.state(), "record": {"history": self.history, "losses": self.losses}}

    def restore(self, state: dict[str, Any]) -> None:
        self.learner.restore(state["learner"])
        self.history, self.losses = state["record"]["history"], state["record"]["losses"]

    def begin(self, reader: Reader, start: int) -> None:
        """Read items from ``reader``, and write metrics, from a step on."""
        self.reader = reader
        self.metrics = MetricsFile(self.root / METRICS_FILE, start, self.report) if self.world.is_main else None
        self.report.phase("training")
        self.report.total(self.schedule.total, "steps", done=start)
        self.report.waits_for("the first step")
        self.last = time.monotonic()

    def items(self) -> Iterator[tuple[int, list[Chunk]]]:
        reader = self.reader
        workers = min(worker_count(self.settings.speed.workers), len(reader))
        chunks = pinned(in_order(reader, workers, preload=[type(reader).__module__]), self.world.device)
        for step in range(reader.start, self.schedule.total):
            yield step, list(islice(chunks, len(reader.own)))

    def step(self, item: tuple[int, list[Chunk]], flags: Flags) -> Figures:
        step, chunks = item
        self.name_rejects(chunks)
        loss = self.learner.step(chunks, step, self.schedule.size(step)).detach().float()
        figures = self.world.sum(torch.cat([loss.reshape(1), flags.on(loss.device)]))
        return Figures(step, *to_host(figures), time.monotonic())

    def name_rejects(self, chunks: list[Chunk]) -> None:
        """Log images that cannot be decoded, once each."""
        for reject in (reject for chunk in chunks for reject in chunk.rejected if reject["path"] not in self.named):
            self.named.add(reject["path"])
            self.report.log(f"replaced {self.reader.root / reject['path']} by another image: {reject['reason']}")

    def out_of_memory(self, item: tuple[int, list[Chunk]], reason: str) -> OutOfMemoryError:
        step, chunks = item
        most = max((len(chunk.labels) for chunk in chunks), default=0)
        begun = any((self.root / CHECKPOINTS_FOLDER).glob("*"))
        remedy = chunk_remedy(self.settings, most, self.world.ranks, begun=begun)
        return out_of_memory(f"a chunk of {most} images", reason, remedy, where=f"step {step}")

    def settle(self, outcome: Figures) -> Flags:
        loss, *flags = on_host(outcome.values, outcome.arrived)
        step, epoch = outcome.step, self.schedule.epoch(outcome.step)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is not finite at step {step}, in epoch {epoch}",
                where="lr",
                fix="lower lr, and use a new output folder",
            )
        self.losses.append(loss)
        rate, lr = self.schedule.size(step) / (outcome.at - self.last), self.learner.rate(step)
        self.last = outcome.at
        if self.metrics:
            self.metrics.write({"step": step, "epoch": epoch, "loss": loss, "lr": lr, "images_per_s": round(rate, 2)})
        self.report.advance(1, loss=loss, lr=lr, epoch=epoch, images_per_s=rate)
        return Flags(*flags)

    def ends_epoch(self, done: int) -> bool:
        return self.schedule.ends_epoch(done - 1)

    def end_epoch(self, done: int) -> Flags:
        """End an epoch; a checkpoint is due if it was scored."""
        epoch = self.schedule.epoch(done - 1)
        line = {"epoch": epoch, "loss": sum(self.losses) / len(self.losses)}
        self.losses = []
        scores = None
        if self.learner.validates(epoch):
            self.report.waits_for("validation")
            scores = self.learner.validate(epoch)
        self.history.append({**line, **(scores or {})})
        if scores:
            self.report.log("  ".join([f"epoch {epoch}", *(f"{name} {value:.4f}" for name, value in scores.items())]))
        self.last = time.monotonic()
        return Flags(checkpoint_due=scores is not None)

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
