"""AdamW with the paper's parameter groups (Table 8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from cae2pipe.config.pretrain import OptimizerSettings

REFERENCE_BATCH = 2048
"""The batch size that learning rates refer to."""


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and LayerScale (one-dimensional); class and mask tokens do decay.

    The caller sets the learning rate for every step. The update is fused: one pass over all weights, which a flag on
    the device can turn into a no-op (``found_inf``).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create a fused AdamW's state, as its first update does: what fits with it fits in all later steps. Weights and
    existing state do not change; gradients are dropped.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    # The device's flag for a gradient that is not finite, which makes an update a no-op.
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)


class Rates(NamedTuple):
    """For a batch size: epochs of warm-up, peak and final learning rate."""

    warmup_epochs: float
    lr: float
    min_lr: float


def scaled(settings: OptimizerSettings, batch: int) -> Rates:
    """The rates for a batch size: scaled linearly with it, unless the settings disable that."""
    factor = batch / REFERENCE_BATCH if settings.scale_lr else 1.0
    return Rates(settings.warmup_epochs, settings.lr * factor, settings.min_lr * factor)
