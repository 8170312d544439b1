"""The order of samples: pure functions of (blocks, seed, epoch), which know nothing of ranks, workers or files.

The blocks of the set are permuted by (seed, epoch). Each shows one view; over V epochs it shows every view it has once.
The permuted blocks make one line of samples, cut into S equal streams; a cut through a block means that two streams
read it. A stream shuffles within windows of a few blocks and gives batch / S samples a step. A global batch is the
concatenation of what all streams give, so it does not depend on who serves which stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cae2pipe.runtime.keyed import keyed_permutation


@dataclass(frozen=True)
class BlockRef:
    """A block that can be read: the shard and its block number, how many samples it holds, which views exist."""

    shard: str
    block: int
    samples: int
    views: tuple[int, ...]


@dataclass(frozen=True)
class BlockSlice:
    """A run of samples [low, high) of one view of a block; ``index`` points into the list of blocks."""

    index: int
    view: int
    low: int
    high: int


@dataclass(frozen=True)
class Window:
    """Consecutive pieces of a stream and the order in which their samples are given out, int64 (samples,)."""

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
    """The pieces of the ``wanted`` streams in an epoch, in order. All streams together hold every sample once."""
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
    """Steps in an epoch: the last batch is padded (``pad``) or left out (``drop``)."""
    return samples // batch if last_batch == "drop" else -(-samples // batch)


def real_samples(samples: int, streams: int, per_stream: int, *, step: int) -> int:
    """Samples, over all streams, that are not padding in step ``step`` of an epoch of ``samples``."""
    ends = [samples * stream // streams for stream in range(streams + 1)]
    lengths = np.diff(ends)
    return int(np.clip(lengths - step * per_stream, 0, per_stream).sum())


def rank_streams(streams: int, ranks: int, rank: int) -> range:
    """The streams a rank serves: a contiguous run, so that ranks in order give the global batch in order."""
    return range(streams * rank // ranks, streams * (rank + 1) // ranks)


def worker_streams(served: range, workers: int, worker: int) -> range:
    """The share of one worker in a rank's streams, contiguous for the same reason. Empty if workers outnumber them."""
    return served[len(served) * worker // workers : len(served) * (worker + 1) // workers]
