"""The device's half of extraction: teacher, rotation and packing, all running concurrently.

Each thread takes one view of a block from the teacher to the packed chunks. On a CUDA device each thread has its own
stream: while one waits for its block, or packs it, the device works on the blocks of the others. The content of a batch
never depends on this, so the bits of the latents do not either. Blocks come out in order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.threads import in_threads
from cae2pipe.targets.calibration import Calibration, token_cosines
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.groups import Cosines, Group, Groups, group_tokens
from cae2pipe.targets.rendering import RenderedBlock
from cae2pipe.targets.store_layout import PATCHES, StoreLayout
from cae2pipe.targets.store_writing import pack_block
from cae2pipe.teachers.check import check_features
from cae2pipe.teachers.protocol import Teacher, TeacherOutput

Ran = tuple[float, float]
"""Start and end, in seconds."""


@dataclass(frozen=True)
class EncodedBlock:
    """The view ``task.views[index]`` of a block, packed: chunks by array, and the cosines of its tokens by group.
    ``ran``: start and end of the teacher's forward pass, in seconds."""

    rendered: RenderedBlock
    index: int
    chunks: dict[str, list[bytes]]
    cosines: dict[str, Cosines]
    ran: Ran

    @property
    def view(self) -> int:
        return self.rendered.task.views[self.index]


ENOUGH = 1000
"""Below this number of views, start and end of the run dominate the time."""


@dataclass
class Meter:
    """Where an extraction's time goes, in seconds. ``teacher``: on CUDA the time with at least one forward pass
    running; on a CPU, where each lane has a core, the mean over ``lanes``."""

    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    teacher: float = 0.0
    rendering: float = 0.0
    packing: float = 0.0
    views: int = 0
    lanes: int = 1
    _until: float = -float("inf")

    def ran(self, began: float, ended: float) -> float:
        """Count a forward pass. Returns what it adds to ``teacher``."""
        if self.lanes == 1:
            began, self._until = max(began, self._until), max(ended, self._until)
        more = max(0.0, ended - began) / self.lanes
        self.teacher += more
        return more

    def seconds(self) -> float:
        """From the start to the end, or to now."""
        return max(1e-9, (self.ended or time.perf_counter()) - self.began)

    def idle_fraction(self) -> float:
        """Share of the time in which the teacher had nothing to do."""
        return max(0.0, 1 - self.teacher / self.seconds())

    def rate(self) -> float:
        """Views per second."""
        return self.views / self.seconds()

    def bottleneck(self) -> str:
        """What limits the extraction, in a sentence."""
        if self.views < ENOUGH:
            return "the run is too short to name a bottleneck"
        if self.idle_fraction() < 0.15:
            return "the teacher is the bottleneck, as intended"
        if self.rendering > self.packing:
            return "decoding and cropping are the bottleneck: more --workers, or more cores, would help"
        return "packing and writing are the bottleneck: a faster disk, or more cores, would help"


DEVICE_LANES = 4
"""Blocks that a CUDA device works on at once (benchmarks/gpu measures 1, 2 and 4)."""


def lane_count(setting: int | None, device: torch.device) -> int:
    """How many blocks are processed at once, each in a thread. None: the default for the device.

    On a CPU the default is one per core. All cores on one block would be slower: the threads of one matrix product wait
    for each other, and for other work on the machine (benchmarks/extraction.py).
    """
    return setting or {"cpu": torch.get_num_threads(), "cuda": DEVICE_LANES}.get(device.type, 1)


def extraction_memory(lanes: int, precision: str) -> AbstractContextManager[None]:
    """Around the teacher's work: an OutOfMemoryError names settings that need less memory."""
    ways = ["--set speed.lanes=1"] if lanes > 1 else []
    ways += ["--set teacher.precision=fp16 (for a new set)"] if precision == "fp32" else []
    return memory_advice(
        f"the teacher's work on {lanes} {'block' if lanes == 1 else 'blocks'} of 64 views",
        ", or ".join([*ways, "stop other programs that use the device"]),
        "extraction",
    )


def encode_ahead(
    blocks: Iterator[RenderedBlock],
    teacher: Teacher,
    groups: Groups,
    *,
    meter: Meter,
    lanes: int,
) -> Iterator[EncodedBlock]:
    """Every view of every block, in order; ``lanes`` at once. ``groups``: what is stored of the teacher's output.

    Raises:
        TeacherError: latents that are not finite, or that the codec cannot hold. OutOfMemoryError: see its message.
    """
    device = teacher.device
    on_cuda = device.type == "cuda"
    meter.lanes = 1 if on_cuda else lanes
    # Once, before the lanes start: otherwise one lane could replace constants that another still reads.
    for group in groups.values():
        group.layout.codec.place(device)
    lane = Lane(device, _timed_event(torch.cuda.default_stream(device))) if on_cuda else None

    def tasks() -> Iterator[tuple[Any, ...]]:
        while (block := _timed_next(blocks, meter)) is not None:
            for index in range(len(block.task.views)):
                yield block, index, lane, teacher, groups

    with (
        extraction_memory(lanes, teacher.info.precision),
        closing(in_threads(_encode, tasks(), lanes, most=lanes + 2)) as encoded,
    ):
        while True:
            began, rendering = time.perf_counter(), meter.rendering
            result = next(encoded, None)
            waited = time.perf_counter() - began - (meter.rendering - rendering)
            if result is None:
                return
            meter.packing += max(0.0, waited - meter.ran(*result.ran))
            meter.views += len(result.rendered.keys)
            yield result


def run_teacher(
    blocks: Iterator[RenderedBlock], teacher: Teacher, lanes: int
) -> Iterator[tuple[RenderedBlock, TeacherOutput]]:
    """Every block with the teacher's output, on the CPU, of its first view. Raises OutOfMemoryError."""

    def run(block: RenderedBlock) -> tuple[RenderedBlock, TeacherOutput]:
        output = teacher(block.pixels[0].to(teacher.device))
        attention = None if output.attention is None else output.attention.cpu()
        summary = None if output.summary is None else output.summary.cpu()
        layers = {layer: tokens.cpu() for layer, tokens in output.layers.items()}
        return block, TeacherOutput(output.tokens.cpu(), attention, summary, layers)

    with extraction_memory(lanes, teacher.info.precision):
        yield from in_threads(run, ((block,) for block in blocks), lanes, most=lanes + 1)


class Lane(threading.local):
    """A CUDA stream for each thread that uses it. ``began``: the event from which all of them measure time."""

    def __init__(self, device: torch.device, began: torch.cuda.Event):
        self.stream, self.began = torch.cuda.Stream(device), began
        # The current stream may still be computing the teacher's constants.
        self.stream.wait_stream(torch.cuda.default_stream(device))

    def seconds(self, event: torch.cuda.Event) -> float:
        """When an event happened. It must have happened already."""
        milliseconds: float = self.began.elapsed_time(event)
        return milliseconds / 1000


def _timed_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _forward(teacher: Teacher, pixels: Tensor, lane: Lane | None) -> tuple[TeacherOutput, Callable[[], Ran]]:
    """The teacher's output, and a function that returns when the pass ran, once the device is done."""
    if lane is None:
        began = time.perf_counter()
        output = teacher(pixels.to(teacher.device))
        ran = began, time.perf_counter()
        return output, lambda: ran
    images = pixels.pin_memory().to(teacher.device, non_blocking=True)
    first = _timed_event(lane.stream)
    output = teacher(images)
    last = _timed_event(lane.stream)
    return output, lambda: (lane.seconds(first), lane.seconds(last))


@torch.inference_mode()
def _encode(
    block: RenderedBlock,
    index: int,
    lane: Lane | None,
    teacher: Teacher,
    groups: Groups,
) -> EncodedBlock:
    task = block.task
    where = f"shard {task.shard.name}, block {task.block}, view {task.views[index]}"
    # A new thread's current device is the first one, whatever the main thread's is; a stream sets its own.
    within: AbstractContextManager[Any] = torch.cuda.stream(lane.stream) if lane else nullcontext()
    with within:
        output, ran = _forward(teacher, block.pixels[index], lane)
        check_output(output, groups, where)
        encoded = {name: encode_group(output, group) for name, group in groups.items()}
    chunks: dict[str, list[bytes]] = {}
    for name, (arrays, *_) in encoded.items():
        chunks |= pack_block(groups[name].layout, arrays)
    cosines = {name: (raw, centred) for name, (_, raw, centred) in encoded.items()}
    return EncodedBlock(block, index, chunks, cosines, ran())


def check_output(output: TeacherOutput, groups: Iterable[str], where: str, *, constant: bool = False) -> None:
    """``check_features`` of each group. Raises TeacherError."""
    for group in groups:
        named = where if group == PATCHES else f"{where}, {group}"
        check_features(group_tokens(output, group), where=named, constant=constant)


def encode_group(output: TeacherOutput, group: Group) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """``encode_tokens`` of a group's part of a teacher's output."""
    tokens = group_tokens(output, group.layout.group)
    return encode_tokens(tokens, output.attention, group.layout, calibration=group.calibration)


def encode_tokens(
    tokens: Tensor, attention: Tensor | None, layout: StoreLayout, *, calibration: Calibration
) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """A block's arrays as stored, and the raw and centred cosines (b * T,) of their decoded tokens to the true ones."""
    unit, norms = unit_tokens(tokens)
    arrays, raw, centred = encode_unit_tokens(unit, layout, calibration)
    arrays["norms"] = norms.cpu().numpy().astype("<f2")
    if layout.attention:
        assert attention is not None
        arrays["attention"] = pack_attention(attention)
    return arrays, raw, centred


def encode_unit_tokens(
    unit: Tensor, layout: StoreLayout, calibration: Calibration
) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """As ``encode_tokens``, of unit tokens (b, T, D). Both results are on the CPU."""
    arrays = layout.codec.encode(unit)
    # Decoded from what is stored, as in training.
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
