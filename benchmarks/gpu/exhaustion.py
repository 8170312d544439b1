"""F: if memory runs out, the advice is right and a grid continues; each run of a process is compiled once."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import at_most
from cae2pipe.config.base import build
from cae2pipe.config.compare import GridSettings
from cae2pipe.errors import OutOfMemoryError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import compare, pretrain
from cae2pipe.training.objective import Objective
from cae2pipe.training.step import Step

LIMIT = 1.0e9
"""Bytes of device memory for this process: enough for Small's weights, moments and some images, not for 128."""


def out_of_memory(state: State, found: Found) -> None:
    """Advice for a batch that does not fit; a grid whose first run does not fit; compiled runs."""
    with limited(state, found):
        advice(state, found)
        grid(state, found)
    compiled_runs(state, found)


@contextmanager
def limited(state: State, found: Found) -> Iterator[None]:
    """Too little memory for ``large``. On a CPU, which has no limit, a stub refuses passes of many images."""
    if state.on_cuda:
        total = torch.cuda.get_device_properties(state.place).total_memory
        torch.cuda.set_per_process_memory_fraction(LIMIT / total, state.place)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, state.place)
        return
    found.skipped["memory fraction"] = "needs CUDA: a stand-in refuses passes of more than 8 images"
    real = Objective.forward

    def refusing(self: Objective, pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(pixels) > 8 and self.training:
            raise torch.OutOfMemoryError("a stand-in's memory has ended")
        return real(self, pixels, *rest)

    with patch.object(Objective, "forward", refusing):
        yield


def large(state: State) -> dict[str, Any]:
    """Settings of a run that does not fit: Small at a batch of 128, two steps."""
    small = {"width": 384, "depth": 12, "heads": 6, "predictor_width": 384, "predictor_heads": 12}
    batch = 32 if state.quick else 128
    return {
        "model": {**state.scale.model, **({} if state.quick else small)},
        "data": {"batch": batch, "streams": 4},
        "precision": "auto",
        "speed": {"compile": None, "workers": 0},
    }


def advice(state: State, found: Found) -> None:
    """The error for a batch that does not fit names an accumulation with which it fits."""
    targets, out = state.targets().root, state.scratch / "exhausted"
    settings = state.settings(**large(state))
    began = time.perf_counter()
    told: OutOfMemoryError | None = None
    try:
        pretrain.pretrain(targets, out, settings, report=Silent())
    except OutOfMemoryError as error:
        told = error.with_traceback(None)
    found.facts["advice after, in seconds"] = round(time.perf_counter() - began, 1)
    found.check("a batch that does not fit raises OutOfMemoryError", told is not None)
    if told is None:
        return
    told.__context__ = None
    found.facts["advice"] = str(told)
    named = re.search(r"speed\.accumulation=(\d+)", told.fix or "")
    found.check("it names an accumulation", named is not None)
    if named is None:
        return
    release(state)
    speed = settings.speed.model_copy(update={"accumulation": int(named[1])})
    again = settings.model_copy(update={"speed": speed})
    pretrain.pretrain(targets, out, again, report=Silent())
    found.check("with which the run ends", (out / "encoder.safetensors").is_file())


def grid(state: State, found: Found) -> None:
    """The first of two runs does not fit: the second finishes, and has as much free memory as the first had."""
    values = large(state)
    first = {key: value for key, value in values.items() if key != "speed"}
    settings = build(
        GridSettings,
        {
            "title": "memory",
            "config": "base",
            "set": {"epochs": 1, "optimizer": {"warmup_epochs": 0}, "precision": "auto"},
            "seeds": 0,
            "variants": [
                {"name": "too large", "set": first},
                {"name": "fits", "set": {"model": state.scale.model, "data": {"batch": 8, "streams": 4}}},
            ],
            "evaluate": [{"kind": "knn", "set": {"k": 5, "speed": {"batch": 8}}}],
        },
        "the grid",
    )
    speed = {"device": state.device, "workers": 0}
    targets, data, out = state.targets().root, state.labelled(), state.scratch / "grid"
    before: list[dict[str, float]] = []
    real = compare.pretrain

    def watched(*arguments: Any, **named: Any) -> Any:
        steps = sum(type(thing) is Step for thing in gc.get_objects())
        held = torch.cuda.memory_allocated(state.place) / 1e6 if state.on_cuda else 0.0
        before.append({"steps": steps, "device_mb": round(held, 1)})
        return real(*arguments, **named)

    release(state)
    with patch.object(compare, "pretrain", watched):
        plan = compare.plan_grid(settings, [targets], data, out=out, speed=speed)
        failed = compare.run_part(plan, data=data, out=out, report=Silent())
    found.facts["before each run"] = before
    kinds = [type(error) for error in failed.values()]
    found.check("the first run is told as out of memory, the second ends", kinds == [OutOfMemoryError])
    found.checks += [
        at_most("models that are alive before the second run", before[-1]["steps"] - before[0]["steps"], 0, 0),
        at_most("MB more on the device than before the first", before[-1]["device_mb"] - before[0]["device_mb"], 50, 1),
    ]


def compiled_runs(state: State, found: Found) -> None:
    """One more compiled run in one process than torch keeps graphs of a function (8): each has exactly one graph."""
    graphs = []
    real = pretrain.compile_objective
    most = 1 if state.quick else config.recompile_limit
    for number in range(most + 1):
        counter = CompileCounterWithBackend(state.backend)

        def counted(objective: Any, world: Any, backend: Any = counter) -> None:
            real(objective, world, backend)

        speed = {"compile": True, "workers": 0}
        model = {**state.scale.model, "depth": 1, "predictor_depth": 0}
        settings = state.settings(seed=number, stop_after=3, model=model, precision="auto", speed=speed)
        with patch.object(pretrain, "compile_objective", counted), config.patch(recompile_limit=most):
            pretrain.pretrain(state.targets().root, state.scratch / f"compiled-{number}", settings, report=Silent())
        graphs.append(counter.frame_count)
    found.facts["graphs of each run"] = graphs
    found.check(f"each of {most + 1} runs in one process is compiled once", graphs == [1] * (most + 1))


def release(state: State) -> None:
    gc.collect()
    if state.on_cuda:
        torch.cuda.empty_cache()
