"""The order of samples: pure functions of (blocks, seed, epoch), independent of ranks, workers and files.

The blocks of the set are permuted by (seed, epoch). In each epoch a block shows one view; in V epochs it shows each of
its V views once. The permuted blocks form one sequence of samples, which is cut into S equal streams; if a cut is
inside a block, two streams read it. A stream shuffles within windows of a few blocks and yields batch / S samples per
step. A global batch is the concatenation over all streams, so it does not depend on which process serves which stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cae2pipe.runtime.keyed import keyed_permutation


@dataclass(frozen=True)
class BlockRef:
    """A readable block: its shard and block number, its number of samples, and its existing views."""

    shard: str
    block: int
    samples: int
    views: tuple[int, ...]


@dataclass(frozen=True)
class BlockSlice:
    """The samples [low, high) of one view of a block; ``index`` is the block's index in the list of blocks."""

    index: int
    view: int
    low: int
    high: int


@dataclass(frozen=True)
class Window:
    """Consecutive pieces of a stream and the order of their samples, int64 (samples,)."""

    pieces: tuple[BlockSlice, ...]
    order: np.ndarray


def view_of(block: BlockRef, seed: int, epoch: int) -> int:
    """The view that a block shows in an epoch."""
    cycle, turn = divmod(epoch, len(block.views))
    order = keyed_permutation(len(block.views), "views", seed, block.shard, block.block, cycle)
    return block.views[int(order[turn])]


def stream_pieces(
    blocks: Sequence[BlockRef], seed: int, epoch: int, *, streams: int, wanted: Sequence[int]
) -> dict[int, list[BlockSlice]]:
    """The pieces of the ``wanted`` streams in an epoch, in order. All streams together contain every sample once."""
    line = keyed_permutation(len(blocks), "blocks", seed, epoch)
    ends = np.cumsum([blocks[index].samples for index in line])
    total = int(ends[-1])
    result: dict[int, list[BlockSlice]] = {}
    for stream in wanted:
        start, stop = total * stream // streams, total * (stream + 1) // streams
        pieces = []
        position = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            index = int(line[position])
            begin = int(ends[position]) - blocks[index].samples
            end = min(stop, int(ends[position]))
            pieces.append(BlockSlice(index, view_of(blocks[index], seed, epoch), low=start - begin, high=end - begin))
            start, position = end, position + 1
        result[stream] = pieces
    return result


def windows(pieces: Sequence[BlockSlice], window: int, seed: int, *, epoch: int, stream: int) -> Iterator[Window]:
    """A stream's pieces in windows of up to ``window`` of them, each shuffled by (seed, epoch, stream, number)."""
    for number, start in enumerate(range(0, len(pieces), window)):
        chosen = tuple(pieces[start : start + window])
        count = sum(piece.high - piece.low for piece in chosen)
        yield Window(chosen, keyed_permutation(count, "window", seed, epoch, stream, number))


def steps_per_epoch(samples: int, batch: int, last_batch: str) -> int:
    """Steps per epoch: the last batch is padded (``pad``) or dropped (``drop``)."""
    return samples // batch if last_batch == "drop" else -(-samples // batch)


def real_samples(samples: int, streams: int, per_stream: int, *, step: int) -> int:
    """Samples, over all streams, that are not padding in step ``step`` of an epoch of ``samples``."""
    ends = [samples * stream // streams for stream in range(streams + 1)]
    lengths = np.diff(ends)
    return int(np.clip(lengths - step * per_stream, 0, per_stream).sum())


def rank_streams(streams: int, ranks: int, rank: int) -> range:
    """The streams of a rank: a contiguous range, so the ranks' parts in order make the global batch in order."""
    return range(streams * rank // ranks, streams * (rank + 1) // ranks)


def worker_streams(served: range, workers: int, worker: int) -> range:
    """One worker's share of a rank's streams, contiguous for the same reason; empty if there are too many workers."""
    return served[len(served) * worker // workers : len(served) * (worker + 1) // workers]
