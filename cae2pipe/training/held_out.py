"""The loss of a student on held-out views: stored targets of images that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.plan import Plan
from cae2pipe.loading.planning import make_plan
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import Objective
from cae2pipe.training.step import Latents, forward

STREAMS = 8
"""Streams of each process: how many workers can read at once."""


def held_out_plan(
    targets: TargetSet,
    settings: PretrainSettings,
    *,
    drop_columns: int,
    batch: int,
    ranks: int = 1,
    blocks: int | None = None,
    others: Sequence[TargetSet] = (),
) -> Plan:
    """A plan whose epochs show each view of a held-out set once, under masks of seed 0: the same views and masks for
    all runs with equal mask settings.

    Args:
        batch: views per pass of each process, rounded up to a multiple of ``STREAMS``. blocks: largest number of blocks
        of views, spread over the set; one view of each block comes first. None: all. others: sets of further teachers.
    """
    per_rank = -(-batch // STREAMS) * STREAMS
    data = {"batch": ranks * per_rank, "streams": ranks * STREAMS, "last_batch": "pad", "decode": "workers"}
    fixed = settings.model_copy(
        update={
            "seed": 0,
            "epochs": targets.views,
            "targets": "cached",
            "views": "stored",
            "mask": settings.mask.model_copy(update={"repeat": 1}),
            "data": settings.data.model_copy(update=data),
            "speed": settings.speed.model_copy(update={"cache": None}),
        }
    )
    plan = make_plan(targets, sorted(targets.stores), fixed, drop_columns=drop_columns, others=others)
    if blocks is None:
        return plan
    chosen = sorted({number * len(plan.blocks) // blocks for number in range(blocks)})
    return replace(
        plan,
        blocks=plan.blocks.take(chosen),
        epochs=max(1, min(plan.epochs, blocks // len(plan.blocks))),
    )


@torch.no_grad()
def summed_terms(objective: Objective, batches: Iterable[Batch], latents: Latents) -> tuple[Tensor, int]:
    """The objective's terms, float64 on the CPU, summed over views; and the number of views of the batches.

    If processes share the batches, the sums of all of them must be added; each counts all views.

    Args:
        objective: in eval mode. batches: decoded. latents: the source of the targets.
    """
    total, views = torch.zeros(len(objective.terms), dtype=torch.float64), 0
    for batch in batches:
        total += forward(objective, batch, latents(batch)).cpu().double() * batch.real
        views += batch.real
    return total, views
