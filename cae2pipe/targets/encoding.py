"""The device's half of extraction: the teacher, the rotation, and what packs the result, all at work at once.

The main thread gives a device one block after the other. A thread takes each result off the device, which is where
it waits for it, and packs it; zstd and the transfer let other threads run meanwhile. On a CPU the threads run the
teacher too, a block each. Blocks come out in order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.targets.calibration import Calibration, token_cosines
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.rendering import RenderedBlock
from cae2pipe.targets.store import Layout, pack_block
from cae2pipe.teachers.check import check_features
from cae2pipe.teachers.protocol import Teacher, TeacherOutput
from cae2pipe.threads import in_threads


@dataclass(frozen=True)
class EncodedBlock:
    """One view of a block, packed: chunks by array, and raw and centred cosines of its tokens, float32 (b * T,)."""

    rendered: RenderedBlock
    place: int
    chunks: dict[str, bytes]
    raw: Tensor
    centred: Tensor
    teacher_s: float

    @property
    def view(self) -> int:
        return self.rendered.task.views[self.place]


ENOUGH = 1000
"""Views below which starting and ending outweigh all else."""


@dataclass
class Meter:
    """Where an extraction's time goes, in seconds; ``teacher`` is a mean over ``lanes``, which run at once."""

    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    teacher: float = 0.0
    rendering: float = 0.0
    packing: float = 0.0
    views: int = 0
    lanes: int = 1

    def seconds(self) -> float:
        """From the beginning to the end, or to now."""
        return max(1e-9, (self.ended or time.perf_counter()) - self.began)

    def waits(self) -> float:
        """Share of the time in which the teacher had nothing to do."""
        return max(0.0, 1 - self.teacher / self.seconds())

    def rate(self) -> float:
        """Views a second."""
        return self.views / self.seconds()

    def verdict(self) -> str:
        """What holds extraction up, in a sentence."""
        if self.views < ENOUGH:
            return "too short a run to say what holds it up"
        if self.waits() < 0.15:
            return "the teacher is the bottleneck, as it should be"
        if self.rendering > self.packing:
            return "decoding and cropping hold it up: more --workers, or more cores, would help"
        return "packing and writing hold it up: a faster disk, or more cores, would help"


def lanes(device: torch.device) -> int:
    """How many blocks a teacher works on at once.

    On a CPU that is one a core, each from the teacher to the packed chunks in one thread. All cores on one block would
    be slower: the threads of one product wait for each other, and for whatever else the machine does
    (benchmarks/extraction.py).
    """
    return torch.get_num_threads() if device.type == "cpu" else 1


PACKERS = 4
"""Threads that pack what a device gives; a CPU's lanes pack their own."""


def encode_ahead(
    blocks: Iterator[RenderedBlock], teacher: Teacher, layout: Layout, calibration: Calibration, meter: Meter
) -> Iterator[EncodedBlock]:
    """Every view of every block, in order.

    Raises:
        TeacherError: latents that are not finite, or that the codec cannot hold.
    """
    on_cpu = teacher.device.type == "cpu"
    meter.lanes = lanes(teacher.device)

    def tasks() -> Iterator[tuple[Any, ...]]:
        while (block := _timed_next(blocks, meter)) is not None:
            for place in range(len(block.task.views)):
                # A device is given its work here, in order; a CPU's teacher runs in the thread.
                work = None if on_cpu else _start(teacher, block.pixels[place])
                yield block, place, work, teacher, layout, calibration

    threads = meter.lanes if on_cpu else PACKERS
    with closing(in_threads(_finish, tasks(), threads, threads + 2)) as encoded:
        while True:
            began, rendering = time.perf_counter(), meter.rendering
            result = next(encoded, None)
            waited = time.perf_counter() - began - (meter.rendering - rendering)
            if result is None:
                return
            teacher_s = result.teacher_s / meter.lanes
            meter.packing += max(0.0, waited - (teacher_s if on_cpu else 0.0))
            meter.teacher += teacher_s
            meter.views += len(result.rendered.keys)
            yield result


def run_teacher(blocks: Iterator[RenderedBlock], teacher: Teacher) -> Iterator[tuple[RenderedBlock, TeacherOutput]]:
    """Every block with the teacher's output, on the CPU, of its first view."""

    def run(block: RenderedBlock) -> tuple[RenderedBlock, TeacherOutput]:
        output = teacher(block.pixels[0].to(teacher.device))
        attention = None if output.attention is None else output.attention.cpu()
        return block, TeacherOutput(output.tokens.cpu(), attention)

    threads = lanes(teacher.device)
    return in_threads(run, ((block,) for block in blocks), threads, threads + 1)


@dataclass(frozen=True)
class _Work:
    """A teacher's output that a CUDA device may still be at work on, and how to learn the time that it took."""

    output: Any
    seconds: float
    events: tuple[Any, Any] | None


def _run(teacher: Teacher, pixels: Tensor) -> _Work:
    began = time.perf_counter()
    output = teacher(pixels)
    return _Work(output, time.perf_counter() - began, None)


def _start(teacher: Teacher, pixels: Tensor) -> _Work:
    if teacher.device.type != "cuda":
        return _run(teacher, pixels.to(teacher.device))
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(teacher.device):
        images = pixels.pin_memory().to(teacher.device, non_blocking=True)
        first.record()
        output = teacher(images)
        last.record()
    return _Work(output, 0.0, (first, last))


@torch.inference_mode()
def _finish(
    block: RenderedBlock, place: int, work: _Work | None, teacher: Teacher, layout: Layout, calibration: Calibration
) -> EncodedBlock:
    work = work or _run(teacher, block.pixels[place])
    task, tokens = block.task, work.output.tokens
    check_features(tokens, where=f"shard {task.shard.name}, block {task.block}, view {task.views[place]}")
    arrays, raw, centred = encode_tokens(tokens, work.output.attention, layout, calibration)
    seconds = work.seconds
    if work.events:
        work.events[1].synchronize()
        seconds = work.events[0].elapsed_time(work.events[1]) / 1000
    return EncodedBlock(block, place, pack_block(layout, arrays), raw, centred, seconds)


def encode_tokens(
    tokens: Tensor, attention: Tensor | None, layout: Layout, calibration: Calibration
) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """A block's arrays as they are stored, and how near their decoding comes: raw and centred cosines (b * T,)."""
    unit, norms = unit_tokens(tokens)
    arrays, raw, centred = encode_unit(unit, layout, calibration)
    arrays["norms"] = norms.cpu().numpy().astype("<f2")
    if layout.attention:
        assert attention is not None
        arrays["attention"] = pack_attention(attention)
    return arrays, raw, centred


def encode_unit(unit: Tensor, layout: Layout, calibration: Calibration) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """The codec's arrays of unit tokens (b, T, D), and how near their decoding comes, on the CPU."""
    arrays = layout.codec.encode(unit)
    # Decoded as training will: from what is stored.
    stored = {name: tensor.to(unit.device) for name, tensor in as_tensors(arrays).items()}
    raw, centred = token_cosines(unit, layout.codec.decode(stored), calibration.mean)
    return arrays, raw.cpu(), centred.cpu()


def pack_attention(attention: Tensor) -> np.ndarray:
    """Attention (b, P) as uint8, each image's largest value 255: only ratios within an image are used."""
    scaled = attention / attention.amax(dim=1, keepdim=True).clamp_min(1e-12) * 255
    return torch.round(scaled).to(torch.uint8).cpu().numpy()


def _timed_next(blocks: Iterator[RenderedBlock], meter: Meter) -> RenderedBlock | None:
    began = time.perf_counter()
    block = next(blocks, None)
    meter.rendering += time.perf_counter() - began
    return block
