"""B5: a step that is not finite changes no weights, ends the run with an error that names it, and can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.gpu.steps import build_step
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import DivergedError
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.planning import make_plan
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import World
from cae2pipe.stages.replay import replay
from cae2pipe.training.checkpoint import Checkpoints, training_state
from cae2pipe.training.parallel import wrap_model
from cae2pipe.training.pretraining import Pretraining
from cae2pipe.training.step import Step
from cae2pipe.training.step_loop import run_steps

BAD = 2
"""The step with latents that are not finite."""


def nothing_spoilt(state: State, found: Found) -> None:
    """One process; ``benchmarks.gpu.ranks`` does the same with sharded weights."""
    diverge(state, found, "alone", state.settings(), World(0, 1, state.place))


def diverge(state: State, found: Found, name: str, settings: PretrainSettings, world: World) -> None:
    """Train on latents that are NaN in one step, and check state and record afterwards."""
    targets = state.targets()
    step = build_step(targets, settings, state.place, world)
    step.module = wrap_model(step.objective, world)
    rebuild_optimizer(step, settings)
    before: list[dict[str, Any]] = []

    def poisoned(batch: Batch) -> Mapping[str, Tensor]:
        if batch.step != BAD:
            return batch.arrays
        if not before:
            before.append(training_state(step.model, step.optimizer))
        decoded = step.objective.parts[0].target(batch.arrays).clone()
        decoded[0] = torch.nan
        return {"decoded": decoded}

    step.latents = poisoned
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=step.model.drop_columns)
    out = state.scratch / f"diverged-{name}"
    checkpoints, report = Checkpoints(out / "checkpoints", "", keep=2, minutes=10), Silent()
    raised: DivergedError | None = None
    try:
        training = Pretraining(
            step,
            plan,
            settings,
            checkpoints=checkpoints,
            target_dim=targets.teacher.dim,
            start=0,
            out=out,
            report=report,
        )
        with closing(training):
            run_steps(training, 0, plan.steps * settings.epochs, checkpoints=checkpoints, world=world, report=report)
    except DivergedError as error:
        raised = error
    found.check(f"{name}: DivergedError names step {BAD}", raised is not None and f"step {BAD}" in raised.what)
    assert before, "the step was not reached"
    after = training_state(step.model, step.optimizer)
    found.check(f"{name}: weights as before, to the bit", same(before[0]["model"], after["model"]))
    # Not the groups' learning rate: on a device the next step starts before the host reads the outcome of this one.
    moments = [values["optimizer"]["state"] for values in (before[0], after)]
    found.check(f"{name}: moments and step counters too", same(*moments))
    if raised is None:
        return
    record = Path(str(raised.where))
    again = replay(record, state.device)
    found.check(f"{name}: the record replays, and names the sample", len(again["inputs"]) == 1)
    found.facts[f"{name}: replay"] = {key: again[key] for key in ("step", "inputs", "module")}


def rebuild_optimizer(step: Step, settings: PretrainSettings) -> None:
    """Make a new optimizer for the current weights, since sharding replaces them."""
    from cae2pipe.training.optimizer import build_optimizer

    step.optimizer = build_optimizer(step.model, settings.optimizer)
    step.parameters = [p for p in step.model.parameters() if p.requires_grad]


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
