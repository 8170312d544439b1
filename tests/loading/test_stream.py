"""When streams read: the same amount in every step, also where an epoch ends and another begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cae2pipe.loading import stream as module
from cae2pipe.loading.order import BlockList
from cae2pipe.loading.planning import make_plan
from cae2pipe.loading.stream import Piece, StreamSource
from cae2pipe.targets import TargetSet

STREAMS, PER_STREAM, STEPS = 64, 32, 24


@pytest.fixture
def plan(target_root, pretrain_settings):
    """A plan of many shards that nobody reads: two epochs of 24 steps, or a little more."""

    targets = TargetSet(target_root)

    def of(samples: int, last_batch: str = "pad", window: int = 4):
        shards = {f"{number:06d}": 1000 for number in range(samples // 1000)} | {"999999": samples % 1000 or 1}
        return replace(
            make_plan(targets, sorted(targets.stores), pretrain_settings(), drop_columns=0),
            blocks=BlockList(shards, dict.fromkeys(shards, (0, 1))),
            batch=STREAMS * PER_STREAM,
            streams=STREAMS,
            window=window,
            epochs=2,
            last_batch=last_batch,
        )

    return of


@pytest.fixture
def reads(monkeypatch):
    """Counts samples read, by the step that is current; pieces hold only keys."""
    counts: Counter[int] = Counter()
    step = [0]

    def read(plan, piece, reader):
        counts[step[0]] += piece.high - piece.low
        keys = [f"{piece.index}/{position}" for position in range(piece.low, piece.high)]
        return Piece(piece.view, keys, [], [], [], {})

    monkeypatch.setattr(module, "read_piece", read)
    return counts, step


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("samples", [STREAMS * PER_STREAM * STEPS, STREAMS * PER_STREAM * STEPS + 777])
@pytest.mark.parametrize("last_batch", ["pad", "drop"])
def test_every_step_reads_as_much_as_it_gives(plan, reads, samples, window, last_batch):
    own = plan(samples, last_batch, window)
    counts, step = reads
    sources = [StreamSource(own, stream, None, epoch=0, skip=0) for stream in range(STREAMS)]
    for epoch in range(2):
        seen: set[str] = set()
        for _ in range(own.steps):
            for source in sources:
                seen |= {piece.keys[position] for piece, position in filter(None, source.take(epoch, PER_STREAM))}
            step[0] += 1
        for source in sources:
            source.end(epoch)
        assert len(seen) == (own.samples if last_batch == "pad" else own.steps * own.batch)
    # The first step fills the streams, the last ones find nothing more to read.
    steady = [counts[number] for number in range(1, 2 * own.steps - window - 5)]
    assert max(steady) < 1.6 * own.batch
    assert min(steady) > 0.35 * own.batch
    assert sum(counts.values()) <= 2 * own.samples


def test_few_pieces_are_in_memory(plan, reads):
    own = plan(STREAMS * PER_STREAM * STEPS + 777)
    source = StreamSource(own, 5, None, epoch=0, skip=0)
    most = 0
    for epoch in range(2):
        for _ in range(own.steps):
            source.take(epoch, PER_STREAM)
            most = max(most, len(source._read))
        source.end(epoch)
    assert most <= own.window + 3
    assert not source._read


@pytest.mark.parametrize("skipped", [0, 1, 7, STEPS - 1])
def test_a_resumed_stream_gives_the_same_and_reads_no_piece_in_vain(plan, reads, skipped):
    own = plan(STREAMS * PER_STREAM * STEPS + 777)
    whole = StreamSource(own, 9, None, epoch=0, skip=0)
    given = [[(p.keys[at], p.view) for p, at in filter(None, whole.take(0, PER_STREAM))] for _ in range(own.steps)]
    reads[0].clear()
    resumed = StreamSource(own, 9, None, epoch=0, skip=skipped * PER_STREAM)
    for step in range(skipped, own.steps):
        assert [(p.keys[at], p.view) for p, at in filter(None, resumed.take(0, PER_STREAM))] == given[step]
    left = sum(map(len, given[skipped:]))
    # Pieces that are partly given, and those of the next epoch that are read ahead.
    assert sum(reads[0].values()) <= left + 64 * (2 * own.window + 4)
