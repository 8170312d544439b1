"""B1, B2: is a training step correct? The device compared with the CPU, and bfloat16 compared with float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import at_most
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.world import World
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import make_objective
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.step import Latents, Step, cached
from cae2pipe.training.target_spec import PixelTargets, target_spec

METHODS = {
    "caev2": "base",
    "cae": "cae",
    "mvp": "mvp",
    "maskdistill": "maskdistill",
    "mae": "mae",
    "mae-pixels": "mae-pixels",
    "dbot": "dbot",
    "milan": "milan",
    "fd": "fd",
}
"""The methods to check, by preset."""
RECIPES = ("paper", "official")
STEPS = 3
LR = 1e-3
CARRIES = 1e-3
"""Below this share of the gradient's norm, a tensor's direction is dominated by rounding."""


def against_cpu(state: State, found: Found) -> None:
    """Loss terms, gradients, their norm, and the weights after three steps, all in float32: device and CPU compared."""
    for method, preset in METHODS.items():
        for recipe in RECIPES:
            settings = state.settings(preset, recipe=recipe)
            set_backends()
            there, here = (build_step(state.targets(), settings, at) for at in (state.place, torch.device("cpu")))
            row = compared(there, here, batches_of(state, settings, there, STEPS))
            found.rows.append({"method": method, "recipe": recipe, **row})
    worst = worst_of(found.rows)
    found.checks += [
        at_most("loss against the CPU's, relative, worst", worst["loss"], 1e-5, 8),
        at_most("other terms, absolute, worst", worst["terms"], 1e-4, 7),
        at_most("gradient's cosine distance from the CPU's, worst", worst["gradient"], 1e-6, 9),
        at_most("of a single tensor, worst", worst["tensor"], 1e-4, 7),
        at_most("gradient's norm, relative, worst", worst["norm"], 1e-4, 7),
        at_most(f"change of the weights in {STEPS} steps, relative distance, worst", worst["weights"], 0.05, 4),
    ]


def bf16_against_fp32(state: State, found: Found) -> None:
    """The same for bfloat16 compared with float32, both eager and on the device."""
    farthest: list[tuple[float, str]] = []
    for method, preset in METHODS.items():
        settings = state.settings(preset)
        full = build_step(state.targets(), settings, state.place)
        half = build_step(state.targets(), settings.model_copy(update={"precision": "bf16"}), state.place)
        (batch,) = batches_of(state, settings, full, 1)
        set_backends()
        wanted = first_step(full, batch)
        set_backends(bf16=True)
        got = first_step(half, batch)
        found.rows.append({"method": method, **difference(got, wanted)})
        farthest += [(value, f"{method}: {name}") for name, value in distances(got, wanted).items()]
    farthest.sort(reverse=True)
    found.facts["farthest tensors"] = {name: rounded(value) for value, name in farthest[:3]}
    worst = worst_of(found.rows)
    # On a CPU, autocast keeps LayerNorm in bfloat16. The effect shows in the head's, after which gradients nearly
    # cancel.
    goal = 5e-3 if state.on_cuda else 0.05
    found.checks += [
        at_most("loss against float32's, relative, worst", worst["loss"], 5e-3, 6),
        at_most("cosine distance of a tensor's gradient from float32's, worst", worst["tensor"], goal, 6),
    ]


def batches_of(state: State, settings: PretrainSettings, step: Step, count: int) -> list[Batch]:
    """The first batches of a run, on the CPU."""
    targets = state.targets()
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=step.model.drop_columns)
    return list(islice(load_batches(plan, 0, 0), count))


def build_step(
    targets: TargetSet, settings: PretrainSettings, device: torch.device, world: World | None = None
) -> Step:
    """A step on ``device`` with weights drawn on the CPU, where random numbers are the same everywhere."""
    torch.manual_seed(0)
    spec = target_spec(settings, targets)
    model = build_method(settings.method, settings.model, spec.dim, spec.summary)
    model.recompute(settings.speed.recompute)
    objective = make_objective(model, targets, settings).to(device).train()
    latents: Latents = cached
    if settings.loss.target == "pixels":
        latents = PixelTargets(settings.model.grid, device)
    return Step(
        objective,
        objective,
        build_optimizer(model, settings.optimizer),
        axes=targets.layout.sample_axes(),
        latents=latents,
        accumulation=settings.speed.accumulation,
        clip=settings.optimizer.clip,
        world=world or World(0, 1, device),
    )


@dataclass(frozen=True)
class Outcome:
    """Results of a step: loss terms (5,), gradient by names of weights, and the gradient's norm, in float64."""

    terms: Tensor
    gradients: dict[str, Tensor]
    norm: float


def first_step(step: Step, batch: Batch) -> Outcome:
    """Forward and backward on a batch; no weight changes."""
    terms = step.backward(batch.to(step.world.device), step.accumulation)
    named = step.model.named_parameters()
    gradients = {name: p.grad.detach().cpu().double() for name, p in named if p.grad is not None}
    norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    return Outcome(terms.cpu().double(), gradients, norm)


def compared(there: Step, here: Step, batches: Sequence[Batch]) -> dict[str, float]:
    """Two steps compared on the same batches: ``difference`` for the first, and the relative distance of the weights'
    change over all of them."""
    row = difference(first_step(there, batches[0]), first_step(here, batches[0]))
    before = flat(here)
    for step in (there, here):
        for batch in batches:
            step(batch.to(step.world.device), LR)
    after = flat(here)
    return {**row, "weights": rounded(float((flat(there) - after).norm() / (after - before).norm()))}


def difference(got: Outcome, wanted: Outcome) -> dict[str, float]:
    """Relative differences of losses and norms, the largest difference of the other terms, cosine distances of the
    whole gradient and of the worst tensor."""
    whole = [torch.cat([outcome.gradients[n].flatten() for n in wanted.gradients]) for outcome in (got, wanted)]
    apart = (got.terms - wanted.terms).abs()
    found = {
        "loss": float(apart[0] / wanted.terms[0].abs()),
        "terms": float(apart[1:].max()),
        "norm": abs(got.norm / wanted.norm - 1),
        "gradient": distance(*whole),
        "tensor": max(distances(got, wanted).values()),
    }
    return {name: rounded(value) for name, value in found.items()}


def distances(got: Outcome, wanted: Outcome) -> dict[str, float]:
    """Cosine distance of each tensor's gradient, for tensors with a relevant share of the norm."""
    return {
        name: distance(got.gradients[name].flatten(), gradient.flatten())
        for name, gradient in wanted.gradients.items()
        if float(gradient.norm()) > CARRIES * wanted.norm
    }


def distance(one: Tensor, other: Tensor) -> float:
    """1 - cosine, also for values that are not finite."""
    found = 1 - float(torch.cosine_similarity(one, other, dim=0))
    return found if found != found else max(0.0, found)


def flat(step: Step) -> Tensor:
    """All weights as one vector, float64 on the CPU."""
    return torch.cat([p.detach().flatten().cpu().double() for p in step.model.parameters()])


def rounded(value: float) -> float:
    """Rounded to three digits for tables."""
    return float(f"{value:.3g}")


def worst_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest value of each numeric column; NaN if it contains one."""
    columns = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: float(np.max([row[name] for row in rows])) for name in columns}
