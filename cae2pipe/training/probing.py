"""When a run is probed, what is written about it, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from cae2pipe.runtime.progress import Report, duration
from cae2pipe.runtime.world import World
from cae2pipe.training.metrics import PROBE_FILE, MetricsFile
from cae2pipe.training.telemetry import Telemetry

SHOWN = {"knn_top1": "kNN", "held_out_loss": "held-out loss", "held_out_centred_cosine_masked": "held-out cosine"}
"""Figures that the log shows."""


def told(name: str) -> str | None:
    """What the log calls a figure, perhaps of one of several teachers (``held_out_loss/clip-b16``); None if it does not
    show it."""
    figure, _, label = name.partition("/")
    return SHOWN.get(figure) and " ".join([SHOWN[figure], *(["of", label] if label else [])])


@dataclass(frozen=True)
class Probed:
    """The outcome of a probe, the same in every process: figures, or why there are none."""

    figures: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    stopped: bool = False


Probe = Callable[[nn.Module], Probed]
"""Measures a student. Called by all processes."""


class Probing:
    """Probes after every ``every``-th epoch and after the last one.

    Args:
        steps: per epoch. start: first step of the training; probes of later steps are removed from the file.
        out: the run's folder. telemetry: in the leading process, where probes are recorded.
    """

    def __init__(
        self,
        probe: Probe,
        every: int,
        *,
        steps: int,
        epochs: int,
        start: int,
        out: Path,
        world: World,
        telemetry: Telemetry | None,
        report: Report,
    ):
        self.probe, self.every, self.steps, self.epochs = probe, every, steps, epochs
        self.start, self.world, self.telemetry, self.report = start, world, telemetry, report
        self.file = MetricsFile(out / PROBE_FILE, start, report, every_step=False) if world.is_main else None
        self.cost_told = False

    def due(self, done: int) -> bool:
        """Whether to probe after ``done`` steps."""
        epoch, rest = divmod(done, self.steps)
        return rest == 0 and epoch > 0 and (epoch % self.every == 0 or epoch == self.epochs)

    def missed(self) -> bool:
        """Whether an earlier process reached the first step, and was stopped before or during the probe there."""
        if not self.due(self.start):
            return False
        return self.world.run_on_main(lambda: self.file is not None and self.start - 1 not in self.file.steps)

    def __call__(self, model: nn.Module, done: int) -> bool:
        """Probe after ``done`` steps. Returns False if a stop was requested: the resumed run probes instead."""
        began = time.monotonic()
        probed = self.probe(model)
        seconds = time.monotonic() - began
        epoch = done // self.steps
        if probed.stopped:
            return False
        if probed.problem:
            self.report.log(f"no probe after epoch {epoch}: {probed.problem}")
        elif self.file and self.telemetry:
            line = {"step": done - 1, "epoch": epoch - 1, **probed.figures, "seconds": round(seconds, 3)}
            self.file.write(line)
            self.file.sync()
            self.telemetry.probed(line)
            shown = [f"{told(name)} {figure:.4f}" for name, figure in probed.figures.items() if told(name)]
            self.report.log(f"epoch {epoch}: {', '.join(shown)}")
        if self.telemetry:
            self.telemetry.paused(seconds)
            self.tell_cost(seconds, done)
        return True

    def tell_cost(self, seconds: float, done: int) -> None:
        """Log once what all probes will cost."""
        if self.cost_told or done == self.start or self.telemetry is None:
            return
        self.cost_told = True
        probes = -(-self.epochs // self.every)
        training = self.telemetry.seconds_per_step(done) * self.steps * self.epochs
        share = probes * seconds / (training + probes * seconds)
        self.report.log(
            f"a probe takes {duration(seconds) if seconds >= 60 else f'{seconds:.1f} s'}; all {probes} will take at "
            f"most about {100 * share:.2g} % of the run's time (change it with --every)"
        )

    def close(self) -> None:
        if self.file:
            self.file.close()
