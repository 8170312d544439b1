"""Learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(
    step: int, steps_per_epoch: int, epochs: int, *, warmup_epochs: float, lr: float, min_lr: float
) -> float:
    """Linear from 0 during the warm-up, then a cosine to ``min_lr``, which the last step reaches (paper, Table 8).

    Args:
        step: from 0, over all epochs.
        steps_per_epoch, epochs: the run's length.
        warmup_epochs: may be a fraction.
        lr, min_lr: peak and final rate, for the run's batch size.
    """
    total, warmup = steps_per_epoch * epochs, round(steps_per_epoch * warmup_epochs)
    if step < warmup:
        return lr * step / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def polynomial_rate(step: int, total: int, warmup: int, *, lr: float, min_lr: float, power: float) -> float:
    """A polynomial from ``lr`` to ``min_lr`` over ``total`` steps, with a linear warm-up over the first ``warmup``
    steps (paper, Table 11; the shape is from CAE's configuration)."""
    rate: float = min_lr + (lr - min_lr) * (1 - step / total) ** power
    return rate * (step + 1) / warmup if step < warmup else rate


def step_rate(step: int, steps_per_epoch: int, warmup: int, *, lr: float, min_lr: float, drops: Sequence[int]) -> float:
    """Linear over ``warmup`` steps, then divided by 10 after each of the epochs ``drops``, but not below ``min_lr``
    (paper, Table 12). An ``lr`` below ``min_lr`` is kept."""
    rate = max(lr * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in drops), min(lr, min_lr))
    return rate * (step + 1) / warmup if step < warmup else rate
