"""One stream of samples: reads its blocks a little before they are needed, each at its own time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cae2pipe.loading.order import BlockSlice, Pieces, shuffled, stream_pieces
from cae2pipe.loading.plan import Plan
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.paths import store_name
from cae2pipe.targets.store import StoreReader


@dataclass(frozen=True)
class Piece:
    """Samples of one view of a block: keys, labels, JPEG bytes, draws (none for fresh views), and arrays as loaded."""

    view: int
    keys: list[str]
    labels: list[int]
    images: list[bytes]
    draws: Sequence[np.ndarray] | np.ndarray
    arrays: dict[str, np.ndarray]


Item = tuple[Piece, int]
"""A sample: its piece, and its position there."""


Reader = Callable[..., StoreReader]
"""Opens a store by its name; a second argument numbers the other teacher whose latents it holds."""


class StreamSource:
    """Gives the samples of one stream, epoch by epoch, each once.

    Blocks are read in their order, one for every 64 samples that are given, also across the ends of epochs, and at
    other times in other streams: so the work of all streams together is the same in every step. About ``window`` + 2
    blocks' worth of samples are in memory.

    Args:
        plan: the plan of the run. stream: its number. reader: opens a store by its name; it may keep some open.
        epoch, skip: the first epoch, and the samples of it that have been given already. Blocks of which no sample is
            left are not read.
    """

    def __init__(self, plan: Plan, stream: int, reader: Reader, *, epoch: int, skip: int):
        self.plan = plan
        self.stream = stream
        self._reader = reader
        self._first = (epoch, skip)
        self._position = epoch * plan.steps * plan.per_stream + skip
        self._epochs: dict[int, _Epoch] = {}
        self._line = self._in_order()
        self._next = next(self._line, None)
        self._read: dict[tuple[int, int], Piece] = {}
        # A piece may be needed half a window before those in front of it have been given.
        phase = (stream + 0.5) / plan.streams
        self._lead = BLOCK * ((plan.window - 1) / 2 + 1 + phase)

    def take(self, epoch: int, count: int) -> list[Item | None]:
        """The next samples of an epoch, by piece and position in it; None for each that it does not have."""
        own = self._epoch(epoch)
        chosen: list[tuple[int, int]] = []
        while len(chosen) < count and (run := own.take(count - len(chosen))):
            chosen += zip(*run, strict=True)
        given: list[Item | None] = []
        # Samples of a piece follow one another, so that they are gathered together.
        for number, position in sorted(chosen):
            given.append((self._piece(epoch, number), position))
            if own.give(number):
                del self._read[epoch, number]
        self._position += count
        self._read_ahead()
        return given + [None] * (count - len(given))

    def end(self, epoch: int) -> None:
        """Forget an epoch, of which a last batch that is dropped leaves samples."""
        del self._epochs[epoch]
        for key in [key for key in self._read if key[0] == epoch]:
            del self._read[key]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(self.plan, self.stream, epoch, self._first[1] * (epoch == self._first[0]))
        return self._epochs[epoch]

    def _in_order(self) -> Iterator[tuple[int, int, float]]:
        """All pieces of which a sample is left: epoch, number, and the position at which it starts."""
        for epoch in range(self._first[0], self.plan.epochs):
            own = self._epoch(epoch)
            begin = epoch * self.plan.steps * self.plan.per_stream
            starts = np.concatenate([[0], np.cumsum(own.pieces.sizes())[:-1]])
            for number in np.flatnonzero(own.left).tolist():
                yield epoch, number, begin + float(starts[number])

    def _read_ahead(self) -> None:
        while self._next is not None and self._next[2] - self._lead <= self._position:
            self._read_next()

    def _read_next(self) -> None:
        assert self._next is not None
        epoch, number, _ = self._next
        # Samples of it may have been left by a last batch that is dropped.
        if epoch in self._epochs:
            self._read[epoch, number] = read_piece(self.plan, self._epochs[epoch].pieces[number], self._reader)
        self._next = next(self._line, None)

    def _piece(self, epoch: int, number: int) -> Piece:
        while (epoch, number) not in self._read:
            self._read_next()
        return self._read[epoch, number]


class _Epoch:
    """A stream's pieces in an epoch after its first ``skip`` samples; ``left``: how many of each piece are left."""

    def __init__(self, plan: Plan, stream: int, epoch: int, skip: int):
        streams = stream_pieces(plan.blocks, plan.seed, epoch, streams=plan.streams, wanted=[stream])
        self.pieces: Pieces = streams[stream]
        self.left = self.pieces.sizes().copy()
        self._runs = shuffled(self.pieces.sizes(), plan.window, plan.seed, epoch=epoch, stream=stream)
        self._run = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        while skip and (chosen := self.take(skip)):
            np.subtract.at(self.left, chosen[0], 1)
            skip -= len(chosen[0])

    def take(self, count: int) -> tuple[list[int], list[int]] | None:
        """Numbers of pieces, and positions in them, of up to ``count`` next samples; None at the end."""
        while not len(self._run[0]):
            run = next(self._runs, None)
            if run is None:
                return None
            self._run = run
        numbers, positions = self._run
        self._run = numbers[count:], positions[count:]
        return numbers[:count].tolist(), positions[:count].tolist()

    def give(self, number: int) -> bool:
        """Count a sample as given. Returns whether it was the last one of its piece."""
        self.left[number] -= 1
        return not self.left[number]


def readers(plan: Plan) -> Reader:
    """Opens the stores of a plan. Some stay open: each holds its store's index and records, about 0.2 MB."""

    @functools.lru_cache(maxsize=64 * (1 + len(plan.others)))
    def opened(name: str, number: int | None = None) -> StoreReader:
        if number is None:
            own = plan.units[name]
            return StoreReader(plan.root, own, plan.layout, more=plan.more, cache=plan.cache, pixels=plan.pixels)
        other = plan.others[number]
        first, *more = other.layouts
        return StoreReader(other.root, other.units[name], first, more=more, cache=plan.cache)

    return opened


def read_piece(plan: Plan, piece: BlockSlice, reader: Reader) -> Piece:
    """The samples of a piece. Raises DamageError where they cannot be read."""
    ref, own = plan.blocks[piece.index], slice(piece.low, piece.high)
    if plan.fresh:
        originals = plan.fresh.read(ref.shard, ref.block)[own]
        keys, labels = [sample.key for sample in originals], [sample.label for sample in originals]
        return Piece(piece.view, keys, labels, [sample.data for sample in originals], [], {})
    names, axes, store = (*plan.arrays, *plan.guides), plan.sample_axes(), store_name(piece.view, ref.shard)
    block = reader(store).loaded_block(ref.block, names)
    read = dict(block.arrays)
    for number, other in enumerate(plan.others):
        wanted = [name.removeprefix(other.prefix) for name in names if name.startswith(other.prefix)]
        latents = reader(store, number).loaded(ref.block, wanted)
        read |= {other.prefix + name: array for name, array in latents.items()}
    arrays = {name: read[name][(slice(None),) * axes[name] + (own,)] for name in names}
    return Piece(piece.view, block.keys[own], block.labels[own].tolist(), block.jpegs[own], block.draws[own], arrays)
