"""One step: forward and backward over the parts of a batch, all-reduce, clip, update. It never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cae2pipe.loading.batches import Batch, split
from cae2pipe.runtime.world import World
from cae2pipe.targets.planes import with_symbols
from cae2pipe.training.objective import TERMS, Objective
from cae2pipe.training.parallel import full_tensor, no_sync

Latents = Callable[[Batch], Mapping[str, Tensor]]
"""From a decoded batch on the device to the latents that an objective takes."""


class Flags(NamedTuple):
    """Values that processes exchange in each step: summed over all of them, so that all make the same decision.

    waited: seconds that a process waited for the step's data. stop: whether a stop was requested. checkpoint_due:
    whether it is time to write a checkpoint.
    """

    waited: float = 0.0
    stop: float = 0.0
    checkpoint_due: float = 0.0

    def on(self, device: torch.device) -> Tensor:
        """As a tensor (3,), filled one by one on the device: copying from the host would wait for the device."""
        return torch.cat([torch.full((1,), float(value), device=device) for value in self])


@dataclass(frozen=True)
class Outcome:
    """Results of a step, on their way to the host: loss terms over the global batch, flags, gradient norm. ``arrived``
    is a CUDA event recorded after the copy; None on a CPU."""

    batch: Batch
    lr: float
    figures: Tensor
    arrived: torch.cuda.Event | None
    terms: tuple[str, ...] = TERMS

    def values(self) -> dict[str, float]:
        """The terms and ``grad_norm``. Waits for this step, not for later ones."""
        *terms, norm = on_host(self.figures, self.arrived)
        return dict(zip(self.terms, terms, strict=False)) | {"grad_norm": norm}

    def flags(self) -> Flags:
        """Summed over processes. Waits as ``values`` does."""
        return Flags(*on_host(self.figures, self.arrived)[len(self.terms) : -1])


NO_FLAGS = Flags()


class Step:
    """Trains on a batch.

    After a loss or gradient that is not finite, this and all later steps leave weights and optimizer unchanged. The
    host may read the outcome one step later, and nothing is corrupted in the meantime.

    Args:
        module, objective: the module to call (wrapped or not), and the bare objective.
        optimizer: fused.
        axes: sample axes of the stored arrays, as for ``split``.
        latents: the source of the targets.
        accumulation: number of parts of a batch.
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
        """Train on this process's share of a batch at a learning rate; flags are summed over processes."""
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
        return Outcome(batch, lr, *to_host(figures), terms=self.objective.terms)

    def backward(self, batch: Batch, accumulation: int) -> Tensor:
        """This process's share of the objective's terms; replaces the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(len(self.objective.terms), device=self.world.device)
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
    """Starts copying figures to the host; returns the copy, and the event that marks its completion.

    If they were copied only when read, the copy would queue behind all work submitted since. The event belongs to the
    figures' own device, whichever is current. Waiting for it blocks without spinning, since the loader needs the cores.
    """
    if figures.device.type != "cuda":
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record(torch.cuda.current_stream(figures.device))
    return host, arrived


def on_host(figures: Tensor, arrived: torch.cuda.Event | None) -> list[float]:
    """The values of a copy that ``to_host`` started; waits for it."""
    if arrived:
        arrived.synchronize()
    numbers: list[float] = figures.tolist()
    return numbers


def forward(module: nn.Module, batch: Batch, latents: Mapping[str, Tensor]) -> Tensor:
    """The contribution of a decoded batch, or of a part of one, to the terms of an objective."""
    repeat = len(batch.visible) // len(batch.weights)
    # A tensor on the device: a Python number would be compiled into the graph.
    real = torch.full((), float(batch.real * repeat), device=batch.pixels.device)
    terms: Tensor = module(batch.pixels, latents, batch.visible, batch.masked, batch.drop, batch.weights, real)
    return terms


def cached(batch: Batch) -> Mapping[str, Tensor]:
    """Latents from the store. Planes are joined here, since the number of single bytes in them varies, and with it the
    graph that would be compiled."""
    return with_symbols(batch.arrays)
