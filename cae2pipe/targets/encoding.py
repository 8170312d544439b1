"""The device's half of extraction: the teacher, the rotation, and what packs the result, all at work at once.

The main thread gives the device one block after the other. A thread takes each result off the device, which is where
it waits for it, and packs it; zstd and the transfer let other threads run meanwhile. Blocks come out in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from cae2pipe.teachers.protocol import Teacher


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


@dataclass
class Meter:
    """Where an extraction's time goes, in seconds."""

    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    teacher: float = 0.0
    rendering: float = 0.0
    packing: float = 0.0
    views: int = 0

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
        if self.waits() < 0.15:
            return "the teacher is the bottleneck, as it should be"
        if self.rendering > self.packing:
            return "decoding and cropping hold it up: more --workers, or more cores, would help"
        return "packing and writing hold it up: a faster disk, or more cores, would help"


def encode_ahead(
    blocks: Iterator[RenderedBlock],
    teacher: Teacher,
    layout: Layout,
    calibration: Calibration,
    threads: int,
    meter: Meter,
) -> Iterator[EncodedBlock]:
    """Every view of every block, in order.

    Raises:
        TeacherError: latents that are not finite, or that the codec cannot hold.
    """
    pending: deque[Future[EncodedBlock]] = deque()
    # Each thread would bring a team of OpenMP threads along, and they would fight the teacher's for the cores.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def oldest() -> EncodedBlock:
            began = time.perf_counter()
            encoded = pending.popleft().result()
            meter.packing += time.perf_counter() - began
            meter.teacher += encoded.teacher_s
            meter.views += len(encoded.rendered.keys)
            return encoded

        try:
            while (block := _timed_next(blocks, meter)) is not None:
                for place in range(len(block.task.views)):
                    work = _start(teacher, block.pixels[place])
                    pending.append(pool.submit(_finish, block, place, work, layout, calibration))
                    if len(pending) > threads + 1:
                        yield oldest()
            while pending:
                yield oldest()
        finally:
            for future in pending:
                future.cancel()


@dataclass(frozen=True)
class _Work:
    """A teacher's output that a CUDA device may still be at work on, and how to learn the time that it took."""

    output: Any
    seconds: float
    events: tuple[Any, Any] | None


def _start(teacher: Teacher, pixels: Tensor) -> _Work:
    if teacher.device.type != "cuda":
        began = time.perf_counter()
        output = teacher(pixels)
        return _Work(output, time.perf_counter() - began, None)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(teacher.device):
        images = pixels.pin_memory().to(teacher.device, non_blocking=True)
        first.record()
        output = teacher(images)
        last.record()
    return _Work(output, 0.0, (first, last))


@torch.inference_mode()
def _finish(block: RenderedBlock, place: int, work: _Work, layout: Layout, calibration: Calibration) -> EncodedBlock:
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
