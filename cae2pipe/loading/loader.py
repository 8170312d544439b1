"""Batches from worker processes, in order.

Every worker serves a contiguous share of the rank's streams and gives its part of every step. torch's DataLoader takes
items from its workers in turn, so each run of W items makes one step.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from cae2pipe.loading.batches import Batch, Plan, batches, join
from cae2pipe.loading.order import BlockRef, rank_streams, worker_streams
from cae2pipe.loading.workers import in_order
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.target_set import TargetSet


def block_refs(targets: TargetSet, stores: list[str] | None = None) -> list[BlockRef]:
    """The readable blocks of a set, sorted by shard and number, each with the views that exist of it.

    ``stores`` restricts them to those a run began with.
    """
    views: dict[str, list[int]] = {}
    samples: dict[str, int] = {}
    for name in sorted(targets.stores if stores is None else stores):
        unit = targets.stores[name]
        views.setdefault(unit["shard"], []).append(unit["view"])
        samples[unit["shard"]] = unit["samples"]
    return [
        BlockRef(shard, block, min(BLOCK, samples[shard] - block * BLOCK), tuple(sorted(views[shard])))
        for shard in sorted(views)
        for block in range(-(-samples[shard] // BLOCK))
    ]


class _Parts(IterableDataset):
    """The steps' parts of the worker that iterates over it."""

    def __init__(self, plan: Plan, served: range, start: int):
        self.plan = plan
        self.served = served
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        own = worker_streams(self.served, info.num_workers, info.id) if info else self.served
        return batches(self.plan, own, self.start)


def load_parts(plan: Plan, start: int, workers: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Batch]]:
    """A rank's batches from global step ``start`` to the end of the last epoch, on the CPU, each in the parts that the
    workers give.

    Args:
        plan: what the batches hold.
        start: the first step, counted over all epochs.
        workers: processes; 0: none. More than the rank has streams are not started.
        rank, ranks: which share of the streams.
    """
    served = rank_streams(plan.streams, ranks, rank)
    parts = _Parts(plan, served, start)
    workers = min(workers, len(served))
    if workers == 0:
        yield from ([part] for part in parts)
        return
    iterator = in_order(parts, workers)
    while True:
        step = [part for _, part in zip(range(workers), iterator, strict=False)]
        if not step:
            return
        assert len(step) == workers
        assert len({part.step for part in step}) == 1, "workers are out of step"
        yield step


def load_batches(plan: Plan, start: int, workers: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """The same, whole."""
    axes = plan.layout.sample_axes()
    return (join(parts, axes) for parts in load_parts(plan, start, workers, rank, ranks))
