"""The order of samples: pure functions of (blocks, seed, epoch), independent of ranks, workers and files.

The blocks of the set are permuted by (seed, epoch). In each epoch a block shows one view; in V epochs it shows each of
its V views once. The permuted blocks form one sequence of samples, which is cut into S equal streams; if a cut is
inside a block, two streams read it. A stream yields batch / S samples per step, from a few neighbouring blocks at any
time. A global batch is the concatenation over all streams, so it does not depend on which process serves which stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from cae2pipe.runtime.keyed import keyed_permutation, keyed_uniforms
from cae2pipe.targets.chunks import BLOCK

ORDER = 2
"""The version of the order, in the identity of every run. Version 1 shuffled within windows that ended together."""
GROUP = 64
"""Pieces whose random distances are drawn together."""


@dataclass(frozen=True)
class BlockRef:
    """A readable block: its shard and block number, its number of samples, and its existing views."""

    shard: str
    block: int
    samples: int
    views: tuple[int, ...]


class BlockList(Sequence[BlockRef]):
    """The blocks of some shards, sorted by shard and number, kept as a few bytes per shard; or a choice of them.

    Args:
        samples: of each shard, by name. views: the existing views of each shard, ascending.
    """

    def __init__(self, samples: Mapping[str, int], views: Mapping[str, tuple[int, ...]]):
        names = sorted(samples)
        self._names = np.array(names, dtype=bytes)
        self._samples = np.array([samples[name] for name in names], dtype=np.int64)
        numbers = {each: number for number, each in enumerate(dict.fromkeys(views[name] for name in names))}
        self._kinds = list(numbers)
        self._kind = np.array([numbers[views[name]] for name in names], dtype=np.int32)
        self._first = np.concatenate([[0], np.cumsum(-(-self._samples // BLOCK))]).astype(np.int64)
        self._chosen: np.ndarray | None = None
        self._permuted: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def take(self, indices: Sequence[int]) -> BlockList:
        """The blocks at some indices."""
        result = BlockList.__new__(BlockList)
        whole = np.arange(len(self)) if self._chosen is None else self._chosen
        result.__dict__.update(self.__dict__, _chosen=whole[np.asarray(indices, dtype=np.int64)], _permuted={})
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permuted": {}}

    def __len__(self) -> int:
        return int(self._first[-1]) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> BlockRef: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockRef]: ...
    def __getitem__(self, index: int | slice) -> BlockRef | list[BlockRef]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index = index % len(self)
        if self._chosen is not None:
            index = int(self._chosen[index])
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        block = index - int(self._first[shard])
        samples = min(BLOCK, int(self._samples[shard]) - block * BLOCK)
        return BlockRef(self._names[shard].decode(), block, samples, self._kinds[self._kind[shard]])

    def sizes(self) -> np.ndarray:
        """Samples of every block, uint8 (blocks,)."""
        sizes = np.full(int(self._first[-1]), BLOCK, dtype=np.uint8)
        sizes[self._first[1:] - 1] = (self._samples - 1) % BLOCK + 1
        return sizes if self._chosen is None else sizes[self._chosen]

    @property
    def total(self) -> int:
        """Samples of all blocks."""
        return int(self._samples.sum() if self._chosen is None else self.sizes().sum(dtype=np.int64))

    def permuted(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As ``permute``; that of the last two epochs is kept, since every stream of a process asks for it."""
        if (seed, epoch) not in self._permuted:
            for old in list(self._permuted)[:-1]:
                del self._permuted[old]
            self._permuted[seed, epoch] = permute(self.sizes(), seed, epoch)
        return self._permuted[seed, epoch]


@dataclass(frozen=True)
class BlockSlice:
    """The samples [low, high) of one view of a block; ``index`` is the block's index in the list of blocks."""

    index: int
    view: int
    low: int
    high: int


def view_of(block: BlockRef, seed: int, epoch: int) -> int:
    """The view that a block shows in an epoch."""
    cycle, turn = divmod(epoch, len(block.views))
    order = keyed_permutation(len(block.views), "views", seed, block.shard, block.block, cycle)
    return block.views[int(order[turn])]


class Pieces(Sequence[BlockSlice]):
    """The pieces of a stream in an epoch, in order. A piece's view is drawn when the piece is asked for.

    Args:
        index, low, high: of every piece, int64 (pieces,).
    """

    def __init__(
        self, blocks: Sequence[BlockRef], seed: int, epoch: int, *, index: np.ndarray, low: np.ndarray, high: np.ndarray
    ):
        self._blocks, self._seed, self._epoch = blocks, seed, epoch
        self._index, self._low, self._high = index, low, high

    def __len__(self) -> int:
        return len(self._index)

    def sizes(self) -> np.ndarray:
        """Samples of every piece, int64 (pieces,)."""
        sizes: np.ndarray = self._high - self._low
        return sizes

    @overload
    def __getitem__(self, number: int) -> BlockSlice: ...
    @overload
    def __getitem__(self, number: slice) -> list[BlockSlice]: ...
    def __getitem__(self, number: int | slice) -> BlockSlice | list[BlockSlice]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        index = int(self._index[number])
        view = view_of(self._blocks[index], self._seed, self._epoch)
        return BlockSlice(index, view, low=int(self._low[number]), high=int(self._high[number]))


def permute(sizes: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of the blocks in an epoch, int64 (blocks,), and where each of them ends in the sequence of samples."""
    line = keyed_permutation(len(sizes), "blocks", seed, epoch)
    return line, np.cumsum(sizes[line], dtype=np.int64)


def stream_pieces(
    blocks: Sequence[BlockRef], seed: int, epoch: int, *, streams: int, wanted: Sequence[int]
) -> dict[int, Pieces]:
    """The pieces of the ``wanted`` streams in an epoch, in order. All streams together contain every sample once."""
    if isinstance(blocks, BlockList):
        line, ends = blocks.permuted(seed, epoch)
    else:
        line, ends = permute(np.array([block.samples for block in blocks], dtype=np.int64), seed, epoch)
    total = int(ends[-1])
    result: dict[int, Pieces] = {}
    for stream in wanted:
        start, stop = total * stream // streams, total * (stream + 1) // streams
        # From the block that holds sample `start` to that which holds sample `stop` - 1.
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left")) if start < stop else first - 1
        end = ends[first : last + 1]
        begin = np.concatenate([[ends[first - 1] if first else 0], end])[: len(end)]
        low, high = np.maximum(start, begin) - begin, np.minimum(stop, end) - begin
        result[stream] = Pieces(blocks, seed, epoch, index=line[first : last + 1], low=low, high=high)
    return result


def shuffled(
    sizes: np.ndarray, window: int, seed: int, *, epoch: int, stream: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The order of a stream's samples in an epoch, in runs: the number of each sample's piece, and its position there.

    A sample's place is the start of its piece plus a random distance of up to ``window`` blocks. So samples of about
    ``window`` consecutive pieces are mixed at any time, and a new piece is needed each time that one ends.

    Args:
        sizes: samples of each piece, int (pieces,).

    Yields:
        Two arrays, int64, of the same length.
    """
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    places, numbers, positions = np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for group, first in enumerate(range(0, len(sizes), GROUP)):
        last = min(first + GROUP, len(sizes))
        added = np.repeat(np.arange(first, last), sizes[first:last])
        distances = keyed_uniforms(len(added), "order", seed, epoch, stream, group)
        places = np.concatenate([places, starts[added] + distances * (window * BLOCK)])
        numbers = np.concatenate([numbers, added])
        positions = np.concatenate([positions, np.arange(starts[first], starts[last]) - starts[added]])
        order = np.argsort(places, kind="stable")
        # No sample of a later piece comes before that piece's start.
        count = len(order) if last == len(sizes) else int(np.searchsorted(places[order], starts[last]))
        given, kept = order[:count], order[count:]
        yield numbers[given], positions[given]
        places, numbers, positions = places[kept], numbers[kept], positions[kept]


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
