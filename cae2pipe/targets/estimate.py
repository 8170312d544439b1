"""What a target set will cost, from a sample of it: bytes, time, and the break-even epoch of the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cae2pipe.artifacts.manifest_targets import group_entries
from cae2pipe.artifacts.manifest_values import CodecName, TeacherEntry
from cae2pipe.shards.shard_set import Shard
from cae2pipe.targets.calibrating import unit_samples
from cae2pipe.targets.calibration import Calibration, Fidelity, calibrate
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.groups import Groups, make_groups
from cae2pipe.targets.manifest_facts import packed_output
from cae2pipe.targets.rendering import VIEWS_AT_ONCE, Task
from cae2pipe.targets.store_layout import PATCHES
from cae2pipe.teachers.protocol import TeacherOutput

CODECS: tuple[CodecName, ...] = ("fp16", "int8", "klt")

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
    """One codec on the sample: bytes per view on disk of each group of latents, the fidelity of the patches on images
    that it was not fitted to, and the calibrated groups."""

    codec: str
    by_group: dict[str, float]
    fidelity: Fidelity
    groups: Groups

    @property
    def latents(self) -> float:
        """Bytes per view of all groups."""
        return sum(self.by_group.values())


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
    outputs: Sequence[TeacherOutput], name: CodecName, teacher: TeacherEntry, *, fidelity: float, level: int
) -> CodecPrice:
    """A codec's price from the teacher's outputs, one per block, on the CPU. ``teacher``: its entry in a manifest."""
    calibrations: dict[str, Calibration] = {}
    reached: dict[str, Fidelity] = {}
    for group, unit in unit_samples(outputs):
        calibrations[group], reached[group] = calibrate(unit, name, fidelity, level=level)
    groups = make_groups(group_entries(teacher, name, level), calibrations)
    # Whole blocks only: the padding of a short one is not representative of a large set.
    whole = [output for output in outputs if len(output.tokens) == BLOCK] or list(outputs)
    views = sum(len(output.tokens) for output in whole)
    by_group = {group: sum(packed_output(output, own) for output in whole) / views for group, own in groups.items()}
    return CodecPrice(name, by_group, reached[PATCHES], groups)


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
