"""JPEGs decoded on a device: the order of work on its streams. torch's CUDA calls are replaced by a log."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cae2pipe.images import jpeg
from cae2pipe.images.jpeg import decode_view
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.device import on_device
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.planning import make_plan
from cae2pipe.targets.target_set import TargetSet

DEVICE = torch.device("cuda", 1)


class Calls:
    """The calls to the device, in order: (call, name of the stream)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.current = [Stream(self, "main")]

    def note(self, call: str, stream: str | None = None) -> None:
        self.log.append((call, stream or self.current[-1].name))

    @contextmanager
    def within(self, stream: Stream):
        self.current.append(stream)
        yield
        self.current.pop()

    def stream_of(self, device: torch.device) -> Stream:
        assert device == DEVICE
        return self.current[-1]


class Stream:
    def __init__(self, calls: Calls, name: str):
        self.calls, self.name = calls, name

    def synchronize(self) -> None:
        self.calls.note("synchronize", self.name)

    def wait_event(self, event: Event) -> None:
        self.calls.note(f"wait for {event.recorded}", self.name)


class Event:
    """Without a stream, an event would be recorded on the current stream of the current device."""

    def __init__(self, calls: Calls):
        self.calls = calls

    def record(self, stream: Stream | None = None) -> None:
        assert stream is not None
        self.recorded = stream.name
        self.calls.note("record", stream.name)


@pytest.fixture
def calls(monkeypatch) -> Calls:
    calls = Calls()

    def decode(images: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
        assert (mode, device) == ("RGB", DEVICE)
        assert all(image.device.type == "cpu" for image in images)
        calls.note("decode")
        return [torch.from_numpy(decode_view(image.numpy().tobytes()).copy()).permute(2, 0, 1) for image in images]

    def copied(batch: Batch, device: torch.device) -> Batch:
        assert device == DEVICE
        calls.note("copy")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(calls, "upload"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(calls))
    monkeypatch.setattr(torch.cuda, "stream", calls.within)
    monkeypatch.setattr(torch.cuda, "current_stream", calls.stream_of)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: calls.note("keep for", stream.name))
    monkeypatch.setattr(Batch, "to", copied)
    monkeypatch.setattr(jpeg, "device_decoder", lambda: decode)
    return calls


@pytest.fixture
def parts(target_root, pretrain_settings):
    """Two batches without padding, each from two workers, and their sample axes."""
    targets = TargetSet(target_root)
    plan = make_plan(targets, sorted(targets.stores), pretrain_settings(data={"decode": "device"}), drop_columns=4)
    return itertools.islice(load_parts(plan, 0, 2), 2), plan.layout.sample_axes()


def test_the_decoder_is_called_when_its_stream_has_nothing_left_to_do(calls, parts):
    batches = on_device(*parts, DEVICE)
    first = next(batches)
    upload = [("copy", "upload"), ("synchronize", "upload"), ("decode", "upload"), ("record", "upload")]
    # The copy of the second starts before the first is returned.
    assert calls.log[: 2 * len(upload)] == 2 * upload
    handed = [("wait for upload", "main")] + [("keep for", "main")] * count(first)
    assert calls.log[2 * len(upload) :] == handed
    second = next(batches)
    assert calls.log[2 * len(upload) :] == 2 * handed
    assert next(batches, None) is None
    assert all((batch.pixels > 0).any() and batch.pixels.shape == (32, 3, 32, 32) for batch in (first, second))


def count(batch: Batch) -> int:
    """The number of a batch's tensors on the device: all but the JPEGs."""
    seen: list[Tensor] = []
    batch.map(lambda tensor: seen.append(tensor) or tensor)
    assert any(tensor is batch.pixels for tensor in seen)
    assert not any(tensor is batch.jpegs or tensor is batch.sizes for tensor in seen)
    return len(seen)
