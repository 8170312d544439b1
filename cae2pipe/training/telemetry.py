"""Metrics of a run: one line per step in ``metrics.jsonl``, the panel, TensorBoard, wandb."""

from __future__ import annotations

import re
import resource
import secrets
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.storage import read_bytes
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.world import World
from cae2pipe.training.flops import peak_tflops, training_flops
from cae2pipe.training.metrics import METRICS_FILE, MetricsFile
from cae2pipe.training.step import Outcome

MACHINE_METRICS = ("images_per_s", "devices", "data_wait", "mfu", "memory_gb", "left_s")
"""Figures of a line that depend on the machine; a repeated run reproduces all others."""


class Telemetry:
    """Records every step, in the leading process.

    Args:
        out: the run's folder. settings: the run's. target_dim: D. start, total: first step and total number of steps.
        world: the processes. report: the panel or the log.
    """

    def __init__(
        self,
        out: Path,
        settings: PretrainSettings,
        *,
        target_dim: int,
        start: int,
        total: int,
        world: World,
        report: Report,
    ) -> None:
        self.world = world
        self.report = report
        self.total = total
        self.repeat = settings.mask.repeat
        self.flops = training_flops(settings, target_dim)
        peak = peak_tflops(world.device, settings.speed.peak_tflops)
        self.peak = peak and peak * 1e12 * world.ranks
        self.metrics = MetricsFile(out / METRICS_FILE, start, report)
        self.trackers = [TRACKERS[name](out, settings, start) for name in settings.track]
        report.total(total, "steps", done=start)
        self.began = self.last = time.monotonic()
        self.start = start
        self.paused_for = 0.0
        self.latest: dict[str, float] = {}
        if world.device.type == "cuda":
            # An earlier run in this process may have needed more.
            torch.cuda.reset_peak_memory_stats(world.device)

    def step(self, outcome: Outcome, values: dict[str, float], waited: float, *, whole: bool = True) -> None:
        """Record a step. ``waited``: seconds that its processes waited for data, on average. ``whole``: whether no
        figures of a probe will follow."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        batch = outcome.batch
        images = batch.real * self.repeat
        rate = images / seconds
        done = batch.step + 1
        clocked = {
            "images_per_s": round(rate, 2),
            "devices": self.world.ranks,
            "data_wait": round(min(1.0, waited / seconds), 4),
            "mfu": round(rate * self.flops / self.peak, 4) if self.peak else None,
            "memory_gb": round(peak_memory(self.world.device) / 1e9, 3),
            "left_s": round((now - self.began) / (done - self.start) * (self.total - done), 1),
        }
        terms = {name: values[name] for name in (*outcome.terms, "grad_norm")}
        line = {"step": batch.step, "epoch": batch.epoch, **terms, "lr": outcome.lr, "images": images, **clocked}
        self.metrics.write(line)
        for tracker in self.trackers:
            tracker.write(line, whole)
        shown = {
            "loss": values["loss"],
            "visible": values["loss_visible"],
            "masked": values["loss_masked"],
            "cos_visible": values["centred_cosine_visible"],
            "cos_masked": values["centred_cosine_masked"],
            "lr": outcome.lr,
            "grad_norm": values["grad_norm"],
            **{name: value for name, value in values.items() if name.startswith("loss/")},
            "epoch": batch.epoch,
            "images_per_s": rate,
            "data_wait": clocked["data_wait"],
            "mfu": clocked["mfu"],
            "memory_gb": clocked["memory_gb"],
        }
        shown |= self.latest
        self.report.advance(1, **{name: value for name, value in shown.items() if value is not None})

    def probed(self, line: dict[str, Any]) -> None:
        """Give the figures of a probe to the trackers, with those of its step, and to the panel."""
        figures = {f"probe/{name}": value for name, value in line.items() if name not in ("step", "epoch")}
        for tracker in self.trackers:
            tracker.write({"step": line["step"], **figures})
        names = {"knn_top1": "knn", "held_out_loss": "held_out_loss"}
        self.latest = {shown: line[name] for name, shown in names.items() if name in line}

    def paused(self, seconds: float) -> None:
        """Training has paused for a probe: it does not count as time of the next step."""
        self.paused_for += seconds
        self.last = time.monotonic()

    def seconds_per_step(self, done: int) -> float:
        """Mean time of a step since the training began or resumed, without pauses."""
        return (self.last - self.began - self.paused_for) / max(1, done - self.start)

    def close(self) -> None:
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: the device's since its statistics were reset, or this process's so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class TensorBoard:
    """Event files in ``tensorboard/``; steps that a killed run wrote after its last checkpoint are hidden."""

    def __init__(self, out: Path, settings: PretrainSettings, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)

    def write(self, line: dict[str, Any], whole: bool = True) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, named after the folder; a resumed run resumes there too."""

    def __init__(self, out: Path, settings: PretrainSettings, start: int):
        import wandb

        self._start = start
        identity = wandb_id(out / "wandb-id.txt")
        self._run = wandb.init(
            project="cae2pipe",
            name=out.name,
            id=identity,
            resume="allow",
            dir=str(out),
            config=settings.model_dump(mode="json"),
        )

    def write(self, line: dict[str, Any], whole: bool = True) -> None:
        known = {name: value for name, value in line.items() if value is not None}
        # Otherwise a step would be held back until the next one, and lost if the run is killed. But wandb drops what
        # comes for a step after its commit, or for one before those that it had when it resumed: a probe that an
        # earlier process has not made goes with the first step.
        late = line["step"] < self._start
        self._run.log(known, step=max(line["step"], self._start), commit=whole and not late)

    def close(self) -> None:
        self._run.finish()


def wandb_id(marker: Path) -> str:
    """The id of a run in wandb: kept in a file of the run's folder, so that a resumed run has the same id.

    Raises:
        SettingsError: the file holds something else.
    """
    try:
        identity = read_bytes(marker).strip()
    except FileNotFoundError:
        identity = secrets.token_hex(4).encode()
        write_bytes(marker, identity + b"\n")
    if not re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", identity):
        raise SettingsError(
            "this file does not contain a wandb run id", where=marker, fix="delete it to start a new wandb run"
        )
    return identity.decode()


TRACKERS: dict[str, type[TensorBoard | Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}
"""Trackers, by the names of their packages."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise SettingsError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise SettingsError(
                f"{name} is not installed", where="track", fix=f"pip install {name}, or omit it from track"
            )
