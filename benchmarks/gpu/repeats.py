"""B7, M5: with deterministic algorithms a run is reproducible to the bit, interrupted or not; and the cost of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Found
from benchmarks.gpu.speed import in_memory
from benchmarks.gpu.state import State
from benchmarks.harness import figures, in_turns, median_ratio
from benchmarks.pretrain import turn
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.telemetry import MACHINE_METRICS

EPOCHS = 4
"""Twenty steps."""


def bit_for_bit(state: State, found: Found) -> None:
    """Twenty steps twice, and again in two halves; also compiled, if compiling does not take minutes."""
    ways = [False, True] if state.on_cuda else [False]
    if not state.on_cuda:
        found.skipped["compiled runs"] = "on a CPU inductor compiles for as long as all else takes"
    for compiled in ways:
        name = "compiled" if compiled else "eager"
        first, second, halves = (state.scratch / f"{name}-{run}" for run in ("first", "second", "halves"))
        for out in (first, second):
            run(state, out, compiled)
        run(state, halves, compiled, stop_after=10)
        run(state, halves, compiled)
        lines = metrics(first)
        found.check(f"{name}: twenty steps", len(lines) == 20)
        found.check(f"{name}: the same metrics twice", metrics(second) == lines)
        found.check(f"{name}: the same weights twice", weights(second) == weights(first))
        found.check(f"{name}: stopped and resumed, the same metrics", metrics(halves) == lines)
        found.check(f"{name}: stopped and resumed, the same weights", weights(halves) == weights(first))


def run(state: State, out: Path, compiled: bool, **over: Any) -> None:
    speed = {"deterministic": True, "compile": compiled}
    settings = state.settings(epochs=EPOCHS, precision="auto", speed=speed, **over)
    pretrain(state.targets().root, out, settings, report=Silent())


def metrics(out: Path) -> list[dict[str, Any]]:
    """A run's lines without figures that depend on time."""
    lines = read_lines(out / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MACHINE_METRICS} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "encoder.safetensors").read_bytes()


def cost(state: State, found: Found) -> None:
    """Images per second of Base, eager, with torch's default algorithms and with deterministic ones."""
    # torch reads it once, at the first matrix product, deterministic or not.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    batch = 8 if state.quick else 256
    step, one, settings = in_memory(state, "base", batch, compiled=False)
    measured = turn(step, repeat(one), 2 if state.quick else 5, state.place)

    def with_backends(deterministic: bool) -> Callable[[], float]:
        def measure() -> float:
            set_backends(settings.precision == "bf16", deterministic, fixed_shapes=True)
            return measured()

        return measure

    contenders = {"default": with_backends(False), "deterministic": with_backends(True)}
    rates = in_turns(contenders, 2 if state.quick else 3)
    found.rows += [
        {"algorithms": name, "images/s": figures(values), "step_ms": round(1000 * batch / max(values), 1)}
        for name, values in rates.items()
    ]
    slower = median_ratio(rates["default"], rates["deterministic"])
    found.facts["deterministic steps take times as long"] = round(slower, 3)
