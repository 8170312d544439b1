"""Pretraining for ``step_loop``: batches of a plan, one line per step, a record of a failed step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cae2pipe.config.pretrain import PretrainSettings, TrainSpeed
from cae2pipe.errors import OutOfMemoryError
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.device import on_device
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.plan import Plan
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.training.checkpoint import Checkpoints, training_state
from cae2pipe.training.compilation import compiles
from cae2pipe.training.failure import capture
from cae2pipe.training.memory import explain_out_of_memory, upload_advice
from cae2pipe.training.optimizer import scaled
from cae2pipe.training.probing import Probe, Probing
from cae2pipe.training.schedule import learning_rate
from cae2pipe.training.step import Flags, Outcome, Step
from cae2pipe.training.telemetry import Telemetry


class Pretraining:
    """Trains on the batches of a plan, from step ``start`` on; a ``step_loop.Training``.

    Args:
        checkpoints: decides after which epochs a checkpoint is kept permanently.
        target_dim: D.
        out: the run's folder, for metrics and records of failed steps.
        report: the panel or the log.
        probe: measures the student every ``settings.probe.every`` epochs. None: no probes.
    """

    def __init__(
        self,
        step: Step,
        plan: Plan,
        settings: PretrainSettings,
        *,
        checkpoints: Checkpoints,
        target_dim: int,
        start: int,
        out: Path,
        report: Report,
        probe: Probe | None = None,
    ):
        self._step, self.plan, self.settings, self.start = step, plan, settings, start
        self.world, self.out, self.target_dim = step.world, out, target_dim
        self.checkpoints = checkpoints
        self.rates = scaled(settings.optimizer, settings.data.batch)
        self.telemetry: Telemetry | None = None
        if self.world.is_main:
            self.telemetry = Telemetry(
                out,
                settings,
                target_dim=target_dim,
                start=start,
                total=plan.steps * settings.epochs,
                world=self.world,
                report=report,
            )
        self.metrics = self.telemetry.metrics if self.telemetry else None
        self.probing: Probing | None = None
        if probe:
            self.probing = Probing(
                probe,
                settings.probe.every,
                steps=plan.steps,
                epochs=settings.epochs,
                start=start,
                out=out,
                world=self.world,
                telemetry=self.telemetry,
                report=report,
            )

    def items(self) -> Iterator[Batch]:
        world, speed = self.world, self.settings.speed
        parts = load_parts(self.plan, self.start, worker_count(speed.workers), rank=world.rank, ranks=world.ranks)
        backend = "inductor" if compiles(speed.compile, world.device) else None
        batches = on_device(parts, self._step.axes, world.device, backend=backend, view_size=self.plan.view_size)
        return with_room(batches, self.settings.loaded_batch // world.ranks, speed)

    def step(self, item: Batch, flags: Flags) -> Outcome:
        return self._step(
            item, learning_rate(item.step, self.plan.steps, self.settings.epochs, **self.rates._asdict()), flags
        )

    def out_of_memory(self, item: Batch, reason: str) -> OutOfMemoryError:
        return explain_out_of_memory(self._step, item, self.settings.speed.recompute)

    def settle(self, outcome: Outcome) -> Flags:
        values, flags = outcome.values(), outcome.flags()
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise capture(self._step, outcome, values, settings=self.settings, target_dim=self.target_dim, out=self.out)
        if self.telemetry:
            probed = self.probing is not None and self.probing.due(outcome.batch.step + 1)
            self.telemetry.step(outcome, values, flags.waited / self.world.ranks, whole=not probed)
        return flags

    def begin(self) -> None:
        """Make the probe that was due at the first step, if an earlier process was stopped before it had made it."""
        if self.probing and self.probing.missed():
            self.probing(self._step.model, self.start)

    def ends_epoch(self, done: int) -> bool:
        return self.checkpoints.for_good(done) or (self.probing is not None and self.probing.due(done))

    def end_epoch(self, done: int) -> Flags:
        probing = self.probing if self.probing and self.probing.due(done) else None
        stopped = probing is not None and not probing(self._step.model, done)
        return Flags(checkpoint_due=self.checkpoints.for_good(done), stop=stopped)

    def state(self) -> dict[str, Any]:
        return training_state(self._step.model, self._step.optimizer)

    def close(self) -> None:
        if self.probing:
            self.probing.close()
        if self.telemetry:
            self.telemetry.close()


def with_room(batches: Iterator[Batch], views: int, speed: TrainSpeed) -> Iterator[Batch]:
    """The batches; ``views`` is this process's share of one. Raises OutOfMemoryError if the device has no room for the
    next one during a step."""
    with memory_advice("the next batch", upload_advice(views, speed.accumulation, speed.recompute), "upload"):
        yield from batches
