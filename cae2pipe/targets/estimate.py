"""What a target set will cost, from a sample of it: bytes, time, and the break-even epoch of the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cae2pipe.shards.shard_set import Shard
from cae2pipe.targets.calibration import Calibration, Fidelity, calibrate, make_codec
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import unit_tokens
from cae2pipe.targets.encoding import encode_tokens
from cae2pipe.targets.rendering import VIEWS_AT_ONCE, Task
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.store_writing import pack_block, packed_bytes
from cae2pipe.teachers.protocol import TeacherOutput

CODECS = ("fp16", "int8", "klt")

SHARE = 8
"""Calibration and measurement of the speed each take at most one view in this many of what extraction does."""
MEASURED = 2048
"""Maximum number of views from which the speed is measured."""

TAR_BLOCK = 512
"""A tar's members are padded to whole blocks, and each has a header of one block."""


def sample_size(total: int, calibration: int) -> int:
    """Images to try the codecs on, for a set of ``total`` views that is calibrated on up to ``calibration`` images: at
    least a block."""
    return min(calibration, max(BLOCK, total // SHARE))


def speed_sample(shards: Sequence[Shard], views: int, total: int) -> list[Task]:
    """What to extract of the shards to measure the speed, for a set of ``total`` views: at least one block of one view,
    and several items for the workers to share."""
    budget = min(MEASURED, max(BLOCK, total // SHARE))
    at_once = max(1, min(VIEWS_AT_ONCE, views, budget // (4 * BLOCK)))
    found: list[Task] = []
    for shard in shards:
        for block in range(-(-shard.samples // BLOCK)):
            for first in range(0, views, at_once):
                task = Task(shard, block, tuple(range(first, min(first + at_once, views))))
                budget -= min(BLOCK, shard.samples - block * BLOCK) * len(task.views)
                if budget < 0 and found:
                    return found
                found.append(task)
    return found


@dataclass(frozen=True)
class CodecPrice:
    """One codec on the sample: bytes per view on disk, and the fidelity on images that it was not fitted to."""

    codec: str
    latents: float
    fidelity: Fidelity
    calibration: Calibration


@dataclass(frozen=True)
class Projection:
    """The whole set: bytes, seconds, and the epoch of pretraining at which the cache breaks even."""

    bytes: int
    seconds: float
    paid_from_epoch: int


def tar_bytes(jpegs: Sequence[bytes]) -> float:
    """Mean bytes per view of its pixels in a tar: the members of JPEG and label."""
    return sum((3 - (-len(jpeg) // TAR_BLOCK)) * TAR_BLOCK for jpeg in jpegs) / len(jpegs)


def price(
    outputs: Sequence[TeacherOutput], name: str, shape: StoreLayout, *, fidelity: float, level: int
) -> CodecPrice:
    """A codec's price from the teacher's outputs, one per block, on the CPU. ``shape``'s own codec is ignored."""
    unit = torch.cat([unit_tokens(output.tokens)[0] for output in outputs])
    calibration, reached = calibrate(unit, name, fidelity, level=level)
    codec = make_codec(name, calibration, level)
    layout = StoreLayout(shape.tokens, shape.dim, shape.patches, shape.attention, codec)
    # Whole blocks only: the padding of a short one is not representative of a large set.
    whole = [output for output in outputs if len(output.tokens) == BLOCK] or list(outputs)
    chunks = 0
    for output in whole:
        arrays, _, _ = encode_tokens(output.tokens, output.attention, layout, calibration=calibration)
        chunks += packed_bytes(pack_block(layout, arrays))
    return CodecPrice(name, chunks / sum(len(output.tokens) for output in whole), reached, calibration)


def project(
    images: int, views: int, bytes_per_view: float, *, extracted_per_s: float, teacher_per_s: float
) -> Projection:
    """The whole set from a sample's figures.

    Args:
        images: distinct images. views: views of each.
        bytes_per_view: pixels and latents on disk.
        extracted_per_s: views per second of the whole extraction on this machine.
        teacher_per_s: views per second of the teacher's forward pass alone. An online teacher runs for every image of
        every epoch; the cache is made once, so it breaks even after ``views * teacher_per_s / extracted_per_s`` epochs.
        The student also saves full-size decoding and cropping, which is not counted.
    """
    return Projection(
        bytes=round(images * views * bytes_per_view),
        seconds=images * views / extracted_per_s,
        paid_from_epoch=math.ceil(round(views * teacher_per_s / extracted_per_s, 6)),
    )
