"""One step: forward and backward over the parts of a batch, exchange, clip, update. It never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cae2pipe.loading.batches import Batch, split
from cae2pipe.runtime.world import World
from cae2pipe.training.objective import TERMS, Objective
from cae2pipe.training.parallel import full_tensor, no_sync

Latents = Callable[[Batch], Mapping[str, Tensor]]
"""What an objective takes as latents, of a decoded batch on the device."""


class Flags(NamedTuple):
    """What processes tell each other with a step: added up over all of them, so that each decides the same.

    waited: seconds that a process waited for the step's data. stop: whether it was asked to stop. checkpoint_due:
    whether it is time to write one.
    """

    waited: float = 0.0
    stop: float = 0.0
    checkpoint_due: float = 0.0

    def on(self, device: torch.device) -> Tensor:
        """As a tensor (3,). Numbers are filled in there, one by one: copying them over would wait for the device."""
        return torch.cat([torch.full((1,), float(value), device=device) for value in self])


@dataclass(frozen=True)
class Outcome:
    """What a step gave, on its way to the host: loss terms over the global batch, flags, gradient norm. ``arrived`` is
    the device's mark behind it, None where it is there at once."""

    batch: Batch
    lr: float
    figures: Tensor
    arrived: torch.cuda.Event | None

    def values(self) -> dict[str, float]:
        """``TERMS`` and ``grad_norm``. Waits for this step, not for what was begun after it."""
        *terms, norm = on_host(self.figures, self.arrived)
        return dict(zip(TERMS, terms, strict=False)) | {"grad_norm": norm}

    def flags(self) -> Flags:
        """Added up over processes. Waits as ``values`` does."""
        return Flags(*on_host(self.figures, self.arrived)[len(TERMS) : -1])


NO_FLAGS = Flags()


class Step:
    """Trains on a batch.

    A loss or gradient that is not finite leaves weights and optimizer as they are, in this and all later steps: the
    host learns of it when it reads the outcome, which may be a step later, and nothing has been spoilt meanwhile.

    Args:
        module, objective: the objective as it is called, wrapped or not, and the bare one.
        optimizer: fused.
        axes: of the stored arrays, as ``split`` takes them.
        latents: where targets come from.
        accumulation: parts that a batch is cut into.
        clip: largest gradient norm.
        world: the processes.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        axes: Mapping[str, int],
        latents: Latents,
        accumulation: int,
        clip: float,
        world: World,
    ):
        self.module = module
        self.objective = objective
        self.model = objective.model
        self.optimizer = optimizer
        self.axes = axes
        self.latents = latents
        self.accumulation = accumulation
        self.clip = clip
        self.world = world
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.found_inf = torch.zeros((), device=world.device)

    def __call__(self, batch: Batch, lr: float, flags: Flags = NO_FLAGS) -> Outcome:
        """Train on this process's share of a batch at a learning rate; flags are added up over processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        terms = self.backward(batch, self.accumulation)
        figures = self.world.sum(torch.cat([terms, flags.on(terms.device)]))
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        figures = torch.cat([figures, norm.reshape(1).float()])
        good = figures[0].isfinite() & norm.isfinite()
        self.found_inf = torch.maximum(self.found_inf, (~good).float())
        self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        return Outcome(batch, lr, *to_host(figures))

    def backward(self, batch: Batch, accumulation: int) -> Tensor:
        """This process's share of the loss terms (5,); gradients are made anew."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(len(TERMS), device=self.world.device)
        parts = split(batch, self.axes, accumulation)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else no_sync(self.module, self.world):
                terms = forward(self.module, part, self.latents(part))
                # DDP and FSDP average over processes; the loss is a sum over them.
                (terms[0] * self.world.ranks).backward()
            total += terms.detach()
        return total


def to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Figures on their way to the host, and the event that says when they are there.

    Copied when they are read, they would come after all that the device has been given since. The event is one of the
    figures' own device, whichever is current; who waits for it sleeps, since cores are for the loader.
    """
    if figures.device.type != "cuda":
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record(torch.cuda.current_stream(figures.device))
    return host, arrived


def on_host(figures: Tensor, arrived: torch.cuda.Event | None) -> list[float]:
    """What ``to_host`` gave, as soon as it is there."""
    if arrived:
        arrived.synchronize()
    numbers: list[float] = figures.tolist()
    return numbers


def forward(module: nn.Module, batch: Batch, latents: Mapping[str, Tensor]) -> Tensor:
    """The share of a decoded batch, or of a part of one, in the terms of an objective."""
    repeat = len(batch.visible) // len(batch.weights)
    # Filled in on the device: as a number it would be compiled in.
    real = torch.full((), float(batch.real * repeat), device=batch.pixels.device)
    terms: Tensor = module(batch.pixels, latents, batch.visible, batch.masked, batch.drop, batch.weights, real)
    return terms


def cached(batch: Batch) -> Mapping[str, Tensor]:
    """Latents as they came from the store."""
    return batch.arrays
