"""B3, B4: a compiled step is one graph, equals an eager step, and never waits for the device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.gpu.steps import LR, batches_of, build_step, difference, first_step
from benchmarks.harness import at_most
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.device import on_device
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.planning import make_plan
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.world import World
from cae2pipe.training.objective import compile_objective
from cae2pipe.training.step import Flags, Outcome

STEPS = 6
"""One more than in an epoch, so that its padded batch is included."""


def against_eager(state: State, found: Found, *presets: str) -> None:
    """Losses over six steps and the first gradient; graphs, breaks and compilations, with ``device=auto``."""
    for preset in presets:
        settings = trained(state, preset)
        set_backends(settings.precision == "bf16")
        eager, step = (build_step(state.targets(), settings, state.place) for _ in range(2))
        batches = batches_of(state, settings, eager, STEPS)
        if torch.device(state.device).index in (0, None):
            step.world = World(0, 1, pick_device("auto" if state.on_cuda else "cpu"))
        counter = CompileCounterWithBackend(state.backend)
        counters.clear()
        compile_objective(step.objective, step.world, counter)
        first = difference(first_step(step, batches[0]), first_step(eager, batches[0]))
        losses = []
        for batch in batches:
            there, here = step(batch.to(state.place), LR).values(), eager(batch.to(state.place), LR).values()
            losses.append(abs(there["loss"] - here["loss"]) / abs(here["loss"]))
        assert any(0 < batch.real < len(batch.weights) for batch in batches), "no batch is padded"
        found.facts[preset] = {
            "precision": settings.precision,
            "backend": state.backend,
            "graphs": counter.frame_count,
            "unique graphs": counters["stats"]["unique_graphs"],
            "breaks": dict(counters["graph_break"]),
        }
        found.checks += [
            at_most(f"{preset}: graphs compiled in {STEPS} steps", counter.frame_count, 1, 0),
            at_most(f"{preset}: graph breaks", sum(counters["graph_break"].values()), 0, 0),
            at_most(f"{preset}: loss against eager's, relative, worst", max(losses), 5e-3, 7),
            at_most(f"{preset}: cosine distance of a tensor's gradient, worst", first["tensor"], 5e-3, 6),
        ]


def trained(state: State, preset: str) -> PretrainSettings:
    """Settings with the defaults of this device: bfloat16 on CUDA."""
    return state.settings(preset, precision="bf16" if state.on_cuda else "fp32")


def without_waiting(state: State, found: Found) -> None:
    """Steps fed by the loader, compiled and eager, with outcomes read one step later: torch raises if one waits."""
    settings = trained(state, "base")
    set_backends(settings.precision == "bf16")
    targets = state.targets()
    for name in ("eager", "compiled"):
        step = build_step(targets, settings, state.place)
        if name == "compiled":
            compile_objective(step.objective, step.world, state.backend)
        plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=step.model.drop_columns)
        batches = list(on_device(load_parts(plan, 0, 0), step.axes, state.place))
        # The first steps select kernels, allocate memory and create moments.
        for batch in batches[:2]:
            step(batch, LR).values()
        read = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            outcomes: list[Outcome] = [step(batch, LR, Flags(waited=0.5)) for batch in batches[2:4]]
            stream = on_device(load_parts(plan, 4, 0), step.axes, state.place)
            outcomes += [step(batch, LR, Flags(waited=0.5)) for batch, _ in zip(stream, range(2), strict=False)]
            for outcome, _ in pairwise(outcomes):
                read.append(outcome.values()["loss"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.check(f"{name}: steps 3 to 6 never wait for the device", len(read) == 3)
