"""The order of an epoch: exactly once, equal steps, independent of ranks and workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.loading.order import (
    BlockRef,
    rank_streams,
    shuffled,
    steps_per_epoch,
    stream_pieces,
    view_of,
    worker_streams,
)

blocks_strategy = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 4)), min_size=1, max_size=30).map(
    lambda sizes: [BlockRef(f"{i // 5:06d}", i % 5, n, tuple(range(v))) for i, (n, v) in enumerate(sizes)]
)


def stream_samples(blocks, seed, epoch, streams, stream, window):
    """(block index, position in block) of a stream's samples, in order."""
    pieces = stream_pieces(blocks, seed, epoch, streams=streams, wanted=[stream])[stream]
    return [
        (pieces[number].index, pieces[number].low + position)
        for run in shuffled(pieces.sizes(), window, seed, epoch=epoch, stream=stream)
        for number, position in zip(*map(np.ndarray.tolist, run), strict=True)
    ]


@settings(deadline=None, max_examples=60)
@given(blocks_strategy, st.integers(0, 5), st.integers(0, 9), st.integers(1, 12), st.integers(1, 5))
def test_every_sample_exactly_once(blocks, seed, epoch, streams, window):
    seen = Counter()
    for stream in range(streams):
        seen.update(stream_samples(blocks, seed, epoch, streams, stream, window))
    assert seen == Counter((i, j) for i, block in enumerate(blocks) for j in range(block.samples))


@settings(deadline=None, max_examples=60)
@given(blocks_strategy, st.integers(1, 12), st.integers(1, 4))
def test_streams_are_equal_and_steps_match_the_batch(blocks, streams, per_stream):
    total = sum(block.samples for block in blocks)
    lengths = [len(stream_samples(blocks, 0, 0, streams, stream, 4)) for stream in range(streams)]
    assert max(lengths) - min(lengths) <= 1
    batch = streams * per_stream
    assert steps_per_epoch(total, batch, "pad") == -(-max(lengths) // per_stream)
    assert steps_per_epoch(total, batch, "drop") == total // batch
    # If the last batch is dropped, every stream has enough samples for all remaining steps.
    assert min(lengths) >= steps_per_epoch(total, batch, "drop") * per_stream


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 64), st.sampled_from([1, 2, 4]), st.integers(1, 7))
def test_ranks_and_workers_partition_the_streams_in_order(multiple, ranks, workers):
    streams = multiple * ranks
    served = [
        stream
        for rank in range(ranks)
        for worker in range(workers)
        for stream in worker_streams(rank_streams(streams, ranks, rank), workers, worker)
    ]
    assert served == list(range(streams))


@settings(deadline=None, max_examples=40)
@given(blocks_strategy, st.integers(0, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_global_batches_do_not_depend_on_ranks_or_workers(blocks, seed, ranks, workers):
    streams, per_stream, epoch = 8, 3, 1
    whole = [stream_samples(blocks, seed, epoch, streams, stream, 2) for stream in range(streams)]
    split = []
    for rank in range(ranks):
        for worker in range(workers):
            own = worker_streams(rank_streams(streams, ranks, rank), workers, worker)
            # A worker requests its own streams only.
            pieces = stream_pieces(blocks, seed, epoch, streams=streams, wanted=own)
            everything = stream_pieces(blocks, seed, epoch, streams=streams, wanted=range(streams))
            assert {s: list(pieces[s]) for s in pieces} == {s: list(everything[s]) for s in own}
            split += [stream_samples(blocks, seed, epoch, streams, stream, 2) for stream in own]
    steps = steps_per_epoch(sum(block.samples for block in blocks), streams * per_stream, "pad")
    for step in range(steps):
        take = slice(step * per_stream, (step + 1) * per_stream)
        assert [s[take] for s in split] == [s[take] for s in whole]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 50))
def test_consecutive_epochs_show_every_view_once(views, seed, cycle):
    block = BlockRef("000003", 7, 64, tuple(range(views)))
    shown = [view_of(block, seed, epoch) for epoch in range(cycle * views, (cycle + 1) * views)]
    assert sorted(shown) == list(range(views))


def test_epochs_and_seeds_differ():
    blocks = [BlockRef("000000", i, 64, (0, 1)) for i in range(40)]
    orders = {tuple(stream_samples(blocks, seed, epoch, 4, 2, 4)[:50]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_growth_of_the_set_does_not_move_the_views_of_old_blocks():
    old = BlockRef("000000", 3, 64, (0, 1, 2))
    assert [view_of(old, 0, epoch) for epoch in range(30)] == [
        view_of(BlockRef("000000", 3, 64, (0, 1, 2)), 0, epoch) for epoch in range(30)
    ]


def test_golden_order():
    """The order for a seed is guaranteed: a refactoring must not change it."""
    blocks = [BlockRef("000000", i, 64, (0, 1, 2)) for i in range(6)]
    pieces = stream_pieces(blocks, 7, 2, streams=2, wanted=[0])[0]
    assert [(p.index, p.view, p.low, p.high) for p in pieces] == GOLDEN

    given_out = list(shuffled(pieces.sizes(), 2, 7, epoch=2, stream=0))
    assert [run[0][60:68].tolist() for run in given_out] == [GOLDEN_NUMBERS]
    assert [run[1][60:68].tolist() for run in given_out] == [GOLDEN_POSITIONS]


GOLDEN = [(5, 0, 0, 64), (0, 1, 0, 64), (3, 0, 0, 64)]
GOLDEN_NUMBERS = [1, 0, 1, 1, 0, 1, 1, 1]
GOLDEN_POSITIONS = [41, 29, 63, 22, 17, 57, 31, 2]


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("pieces", [1, 63, 64, 65, 300])
def test_few_pieces_are_mixed_at_a_time(window, pieces):
    sizes = np.full(pieces, 64)
    sizes[[0, -1]] = 17
    numbers = np.concatenate([run[0] for run in shuffled(sizes, window, 0, epoch=0, stream=0)])
    assert np.array_equal(np.bincount(numbers), sizes)
    first = np.array([np.flatnonzero(numbers == each)[0] for each in range(pieces)])
    last = np.array([np.flatnonzero(numbers == each)[-1] for each in range(pieces)])
    alive = [int(((first <= at) & (at <= last)).sum()) for at in range(0, len(numbers), 16)]
    assert max(alive) <= window + 1
    # A piece is needed half a window before the end of those in front of it at the earliest.
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    assert (starts - first).max() <= 64 * (window - 1) / 2 + 32


def test_neighbours_in_a_block_are_far_apart_when_given():
    numbers = np.concatenate([run[0] for run in shuffled(np.full(100, 64), 4, 0, epoch=0, stream=0)])
    same = (numbers[1:] == numbers[:-1]).mean()
    assert 0.2 < same < 0.3, "as if drawn from four blocks"
