"""Copies to a device ahead of use, and copies back after the work that computes the values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cae2pipe.loading.batches import Batch, join
from cae2pipe.loading.device import on_device
from cae2pipe.runtime.upload import pinned as pinned_items
from cae2pipe.runtime.upload import uploaded
from cae2pipe.supervised.schedule import Chunk, Reader, TrainSchedule
from cae2pipe.training.step import Outcome, to_host
from tests.cuda.simulated import on_cpu

DEVICES = [torch.device("cuda", index) for index in (0, 1, 7)]
AXES = {"symbols": 1}


def batch(step: int, views: int = 2) -> Batch:
    """A part of a batch, with numbers that differ from those of all other steps."""
    base = torch.arange(views) + 10 * step
    return Batch(
        epoch=0,
        step=step,
        real=views,
        pixels=base.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8),
        jpegs=torch.zeros(0, dtype=torch.uint8),
        sizes=torch.zeros(views, dtype=torch.int64),
        arrays={"symbols": base.view(1, -1, 1).expand(5, -1, 3).to(torch.int16)},
        weights=torch.ones(views),
        visible=base.view(-1, 1),
        masked=base.view(-1, 1),
        drop=base.view(-1, 1) / 7,
        keys=["key"] * views,
        views=[0] * views,
    )


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors that go to the device."""
    seen: list[Tensor] = []
    batch.map(lambda tensor: seen.append(tensor) or tensor)
    return seen


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_figures_are_read_when_they_have_come_from_their_own_device(device, cuda, machine):
    """Also if another device is current, as when a Step is used without ``pick_device``."""
    with cuda:
        figures = torch.arange(9.0, device=device)
        outcome = Outcome(batch(0), 0.1, *to_host(figures))
        assert outcome.figures.device.type == "cpu"
        assert outcome.figures.isnan().all()  # not copied yet
        assert list(outcome.values().values()) == [0, 1, 2, 3, 4, 8]
        assert outcome.flags() == (5, 6, 7)
        assert cuda.waits == []
    assert outcome.arrived.stream is machine.streams[device.index]


def test_waiting_for_figures_leaves_the_core_to_others(cuda):
    with cuda:
        _, arrived = to_host(torch.zeros(3, device="cuda:0"))
    assert arrived.blocking


def test_figures_on_the_host_are_there_at_once():
    figures = torch.arange(7.0)
    assert to_host(figures) == (figures, None)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_batches_come_one_ahead_on_a_stream_of_their_own(device, cuda, machine, monkeypatch):
    asked, recorded = [], []

    def steps():
        for step in range(3):
            asked.append(step)
            yield [batch(step), batch(step + 5)]

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(stream))
    current = machine.stream(device)
    with cuda:
        batches = on_device(steps(), AXES, device)
        for step in range(3):
            given = next(batches)
            wanted = join([batch(step), batch(step + 5)], AXES)
            assert given.step == step
            for tensor, own in zip(tensors(given), tensors(wanted), strict=True):
                assert tensor.device == device
                assert torch.equal(on_cpu(tensor), own)
            # Computation waits for the copy, and the copy's memory is kept until the computation is done.
            event = current.waited[step]
            assert event.stream.device == device
            assert event.stream is not current
            assert recorded == [current] * len(tensors(given)) * (step + 1)
        assert next(batches, None) is None
        assert cuda.waits == []
    assert asked == [0, 1, 2]
    assert machine.current == 0
    assert machine.stream(device) is current


class Chunks(Reader):
    def __getitem__(self, index: int) -> Chunk:
        step, number = self.place(index)
        return Chunk(step, number, torch.full((2, 3, 4, 4), step, dtype=torch.uint8), torch.tensor([step, number]))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_chunks_come_pinned_and_in_order(device, cuda, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    schedule = TrainSchedule(images=8, used=8, steps=2, chunks=2, epochs=1, seed=0)
    with cuda:
        chunks = Chunks(schedule, range(2), 0)
        items = list(uploaded(pinned_items((chunks[n] for n in range(4)), device), device))
        assert [(chunk.step, chunk.number) for chunk in items] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for chunk in items:
            assert (chunk.pixels.device, chunk.labels.device) == (device, device)
            assert on_cpu(chunk.labels).tolist() == [chunk.step, chunk.number]
    assert cuda.waits == []
    assert len(pinned) == 8
