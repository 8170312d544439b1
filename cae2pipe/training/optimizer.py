"""AdamW with the paper's groups (Table 8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from cae2pipe.config.pretrain import OptimizerSettings

REFERENCE_BATCH = 2048
"""The batch that learning rates are given for."""


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW whose decay spares biases, norms and LayerScale, all of one dimension; class and mask tokens do decay.

    The learning rate is set step by step from outside. The update runs fused, in one pass over all weights, which can
    also be told on the device to leave everything as it is (``found_inf``).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make a fused AdamW's state, as its first update does: what fits beside it fits in all later steps. Weights, and
    state that is there already, do not change; gradients are gone.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    # What the device is told of a gradient that is not finite, after which an update leaves all as it is.
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)


class Rates(NamedTuple):
    """Of a batch: epochs of warm-up, peak and final learning rate."""

    warmup_epochs: float
    lr: float
    min_lr: float


def scaled(settings: OptimizerSettings, batch: int) -> Rates:
    """The rates for a batch: they scale linearly with it, unless told otherwise."""
    factor = batch / REFERENCE_BATCH if settings.scale_lr else 1.0
    return Rates(settings.warmup_epochs, settings.lr * factor, settings.min_lr * factor)
