"""Extraction on a CUDA device: each thread uses its own stream, and the teacher's time is counted correctly."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cae2pipe.errors import OutOfMemoryError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets import encoding
from cae2pipe.targets.encoding import Meter, lane_count
from cae2pipe.teachers.protocol import Teacher
from tests.conftest import contents


def test_a_device_is_busy_while_any_forward_runs() -> None:
    meter = Meter(lanes=1)
    assert meter.ran(0.0, 2.0) == 2.0
    assert meter.ran(1.0, 1.5) == 0.0, "within the first"
    assert meter.ran(1.0, 3.0) == 1.0, "beyond the first"
    assert meter.ran(5.0, 6.0) == 1.0, "after a pause"
    assert meter.teacher == 4.0


def test_a_cpus_lanes_count_by_their_mean() -> None:
    meter = Meter(lanes=2)
    meter.ran(0.0, 2.0)
    meter.ran(0.0, 2.0)
    assert meter.teacher == 2.0


def test_blocks_at_once() -> None:
    assert lane_count(None, torch.device("cuda:1")) == encoding.DEVICE_LANES
    assert lane_count(None, torch.device("cpu")) == torch.get_num_threads()
    assert lane_count(3, torch.device("cpu")) == 3


class Stream:
    """A stub that records who works on it."""

    def __init__(self, device: torch.device):
        self.device, self.owner, self.waits = device, threading.current_thread(), []

    def wait_stream(self, other: str) -> None:
        self.waits.append(other)


@pytest.fixture
def streams(monkeypatch) -> SimpleNamespace:
    """CUDA's streams and events, patched; ``used``: the stream, and the thread, of every forward pass."""
    made: list[Stream] = []
    current = threading.local()
    used: list[tuple[Stream, threading.Thread]] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing
            self.stream = None

        def record(self, stream) -> None:
            self.stream = stream

        def elapsed_time(self, other) -> float:
            assert self.stream == "default"
            assert other.stream in made
            return 1000.0

    @contextmanager
    def on(stream):
        current.stream = stream
        yield
        current.stream = None

    def stream_of(device):
        made.append(Stream(device))
        return made[-1]

    real = Teacher.__call__

    def watched(self, pixels):
        if getattr(current, "stream", None):
            used.append((current.stream, threading.current_thread()))
        return real(self, pixels)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", stream_of)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Teacher, "__call__", watched)
    return SimpleNamespace(made=made, used=used)


def test_every_thread_has_its_stream_and_the_bytes_are_the_same(
    photos, target_root, extract_settings, tmp_path, monkeypatch, streams
) -> None:
    class Device:
        type = "cuda"

    real, move, fake = encoding.encode_ahead, torch.Tensor.to, Device()

    def moved(self, *arguments, **options):
        return self if arguments[0] is fake else move(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", moved)

    def as_on_cuda(blocks, teacher, *more, **named):
        device, teacher.device = teacher.device, fake
        try:
            yield from real(blocks, teacher, *more, **named)
        finally:
            teacher.device = device

    monkeypatch.setattr("cae2pipe.targets.extraction.encode_ahead", as_on_cuda)
    # Only on a CPU is a batch split into groups of eight, which could change the last bits.
    monkeypatch.setattr("cae2pipe.teachers.protocol.CPU_BATCH", 64)
    extract_targets(photos, tmp_path / "set", extract_settings(speed={"lanes": 3}), report=Silent())
    assert 2 <= len(streams.made) <= 4, "one for each thread, the main one included"
    assert all(stream.waits == ["default"] for stream in streams.made)
    assert len(streams.used) == 2 * 5, "five blocks, two views"
    assert all(stream.owner is thread for stream, thread in streams.used)
    assert threading.main_thread() not in {thread for _, thread in streams.used}
    assert contents(tmp_path / "set") == contents(target_root)


def test_memory_that_ends_is_named_with_what_needs_less(photos, extract_settings, tmp_path, monkeypatch) -> None:
    def ended(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(Teacher, "__call__", ended)
    with pytest.raises(OutOfMemoryError, match=r"3 blocks of 64 views.*Tried to allocate 2\.00 GiB") as caught:
        extract_targets(photos, tmp_path / "set", extract_settings(speed={"lanes": 3}), report=Silent())
    assert "--set speed.lanes=1" in caught.value.fix
    assert "GPU 0 has" not in caught.value.what


def test_advice_names_only_what_would_help() -> None:
    def fix(lanes: int, precision: str) -> str | None:
        with pytest.raises(OutOfMemoryError) as caught, encoding.extraction_memory(lanes, precision):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return caught.value.fix

    assert fix(1, "fp16") == "stop other programs that use the device"
    assert fix(4, "fp16") == "--set speed.lanes=1, or stop other programs that use the device"
    assert "teacher.precision=fp16" in (fix(1, "fp32") or "")
