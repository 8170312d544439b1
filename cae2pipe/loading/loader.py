"""Batches from worker processes, in order.

Every worker serves a contiguous share of the rank's streams and yields its part of every step. Items are taken from the
W workers in turn, so W consecutive items make one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from cae2pipe.errors import ManifestError
from cae2pipe.loading.batches import Batch, batches, join, shared_arrays
from cae2pipe.loading.order import BlockList, rank_streams, worker_streams
from cae2pipe.loading.plan import Plan
from cae2pipe.runtime.shared_memory import round_bytes
from cae2pipe.runtime.workers import in_order
from cae2pipe.targets.paths import of_store
from cae2pipe.targets.target_set import TargetSet


def block_refs(targets: TargetSet, stores: Sequence[str] | None = None) -> BlockList:
    """The readable blocks of a set, sorted by shard and number, each with its existing views.

    ``stores`` restricts them to the stores that a run started with.

    Raises:
        ManifestError: the views of a shard differ in their number of samples.
    """
    views: dict[str, list[int]] = {}
    samples: dict[str, int] = {}
    for name in targets.stores if stores is None else stores:
        view, shard = of_store(name)
        views.setdefault(shard, []).append(view)
        count = targets.stores.samples[name]
        if samples.setdefault(shard, count) != count:
            raise ManifestError(
                f"the views of shard {shard} have {count} and {samples[shard]} samples",
                where=targets.root,
                fix="restore manifest.json from a copy, or make the set again",
            )
    return BlockList(samples, {shard: tuple(sorted(views[shard])) for shard in views})


@dataclass(frozen=True)
class _Parts:
    """The parts of all steps, divided by streams."""

    plan: Plan
    served: range
    start: int

    def share(self, worker: int, workers: int) -> Iterator[Batch]:
        return batches(self.plan, worker_streams(self.served, workers, worker), self.start, self.served)


def load_parts(plan: Plan, start: int, workers: int, *, rank: int = 0, ranks: int = 1) -> Iterator[list[Batch]]:
    """A rank's batches from global step ``start`` to the end of the last epoch, on the CPU, each as a list of the
    workers' parts.

    Args:
        plan: the content of the batches.
        start: the first step, counted over all epochs.
        workers: number of processes, 0 for none; at most one per stream of the rank is started.
        rank, ranks: which share of the streams.
    """
    served = rank_streams(plan.streams, ranks, rank)
    parts = _Parts(plan, served, start)
    workers = min(workers, len(served))
    room = round_bytes(shared_arrays(plan, len(served) * plan.per_stream))
    iterator = in_order(parts, workers, preload=[__name__], room=room)
    while True:
        step = list(islice(iterator, max(1, workers)))
        if not step:
            return
        assert len(step) == max(1, workers)
        assert len({part.step for part in step}) == 1, "workers are out of step"
        yield step
        # Otherwise it would keep its memory while the next one is taken.
        del step


def load_batches(plan: Plan, start: int, workers: int, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """As ``load_parts``, with the parts of each batch joined."""
    axes = plan.sample_axes()
    return (join(parts, axes) for parts in load_parts(plan, start, workers, rank=rank, ranks=ranks))
