"""One step: forward and backward over the parts of a batch, exchange, clip, update. It never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cae2pipe.loading.batches import Batch, split
from cae2pipe.runtime.world import World
from cae2pipe.training.objective import TERMS, Objective
from cae2pipe.training.parallel import whole, without_exchange

Latents = Callable[[Batch], Mapping[str, Tensor]]
"""What an objective takes as latents, of a decoded batch on the device."""


@dataclass(frozen=True)
class Outcome:
    """What a step gave, on its way to the host: loss terms over the global batch, the processes' sums of what they sent
    along, gradient norm. ``arrived`` is the device's mark behind it, None where it is there at once."""

    batch: Batch
    lr: float
    figures: Tensor
    arrived: torch.cuda.Event | None

    def values(self) -> dict[str, float]:
        """``TERMS``, ``sent`` 0, 1, ... and ``grad_norm``. Waits for this step, not for what was begun after it."""
        if self.arrived:
            self.arrived.synchronize()
        numbers = self.figures.tolist()
        sent = len(numbers) - len(TERMS) - 1
        names = (*TERMS, *(f"sent{place}" for place in range(sent)), "grad_norm")
        return dict(zip(names, numbers, strict=True))


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
        self.spoilt = torch.zeros((), device=world.device)

    def __call__(self, batch: Batch, lr: float, sent: tuple[float, ...] = ()) -> Outcome:
        """Train on this process's share of a batch at a learning rate; ``sent`` is added up over processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        terms = self.backward(batch, self.accumulation)
        # Numbers are filled in there, one by one: copying them over would wait for the device.
        own = [torch.full((1,), value, device=terms.device) for value in sent]
        figures = self.world.sum(torch.cat([terms, *own]))
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        figures = torch.cat([figures, norm.reshape(1).float()])
        good = figures[0].isfinite() & norm.isfinite()
        self.spoilt = torch.maximum(self.spoilt, (~good).float())
        self.optimizer.found_inf = self.spoilt  # type: ignore[attr-defined]
        self.optimizer.step()
        return Outcome(batch, lr, *to_host(figures))

    def backward(self, batch: Batch, accumulation: int) -> Tensor:
        """This process's share of the loss terms (5,); gradients are made anew."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(len(TERMS), device=self.world.device)
        parts = split(batch, self.axes, accumulation)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else without_exchange(self.module, self.world):
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
