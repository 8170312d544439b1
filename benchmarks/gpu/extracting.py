"""E3: speed of extraction compared with the teacher's forward pass alone, and where the time goes."""

from __future__ import annotations

import shutil
import statistics
import time
from itertools import cycle, islice, pairwise

import torch

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import at_least, figures
from benchmarks.pretrain import wait_for
from benchmarks.sample import rendered
from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.encoding import Meter, encode_ahead, encode_tokens
from cae2pipe.targets.extraction import make_views
from cae2pipe.targets.images import make_images
from cae2pipe.targets.missing import missing_units
from cae2pipe.targets.paths import CODEC, CODEC_FOLDER
from cae2pipe.targets.rendering import RenderedBlock
from cae2pipe.targets.store_writing import pack_block
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher

BLOCKS = 16
"""Number of rendered blocks in memory, which are used repeatedly."""


def rates(state: State, found: Found) -> None:
    """The teacher alone at several batch sizes; extraction from rendered blocks in memory with different numbers of
    concurrent blocks; and extraction of photographs as a user runs it."""
    targets = state.clip_targets()
    settings = state.clip_settings()
    set_backends()
    teacher = load_teacher(settings.teacher, state.place)
    shards = state.shards()
    blocks = rendered(shards, settings, 1 if state.quick else BLOCKS)
    found.facts["precision"] = teacher.info.precision
    bare = {
        batch: bare_rate(teacher, torch.cat([block.pixels[0] for block in blocks])[:batch], state)
        for batch in ((8, 16) if state.quick else (64, 128, 256, 512))
    }
    found.rows += [
        {"what": f"the teacher's forward, {batch} images at once", "views/s": figures(values)}
        for batch, values in bare.items()
    ]
    best = max(max(values) for values in bare.values())
    for count in (1, 2) if state.quick else (1, 2, 4):
        values = [from_memory(targets, blocks, teacher, count, state).rate() for _ in range(2)]
        found.rows.append({"what": f"extraction from memory, {count} at once", "views/s": figures(values)})
        found.facts[f"of the teacher, {count} at once"] = round(max(values) / best, 3)
    found.facts["ms a block of 64"] = stages_of_a_block(targets, blocks, teacher)
    meter = whole(state, found, targets, shards, teacher)
    found.rows.append(
        {
            "what": f"extraction of {meter.views} photographs, {worker_count(settings.speed.workers)} workers",
            "views/s": figures([meter.rate()]),
            "teacher_waits": round(meter.idle_fraction(), 3),
            "waited_for_rendering_s": round(meter.rendering, 1),
            "waited_for_packing_s": round(meter.packing, 1),
        }
    )
    found.goals.append(at_least("extraction over the teacher's best forward", meter.rate() / best, 0.85))


def bare_rate(teacher: Teacher, pixels: torch.Tensor, state: State) -> list[float]:
    """Views per second of the teacher on a batch on the device: three rounds after a warm-up."""
    pixels = pixels.to(state.place)
    views = 32 if state.quick else 4096
    rates = []
    for turn in range(4):
        began, done = time.perf_counter(), 0
        while done < views:
            teacher(pixels)
            done += len(pixels)
        wait_for(state.place)
        if turn:
            rates.append(done / (time.perf_counter() - began))
    return rates


def from_memory(targets: TargetSet, blocks: list[RenderedBlock], teacher: Teacher, count: int, state: State) -> Meter:
    """Extraction without rendering and writing: teacher, codec and packing, ``count`` blocks at once."""
    meter = Meter()
    total = len(blocks) * (2 if state.quick else 8)
    for _ in encode_ahead(islice(cycle(blocks), total), teacher, targets.groups, meter=meter, lanes=count):
        pass
    meter.ended = time.perf_counter()
    return meter


@torch.inference_mode()
def stages_of_a_block(targets: TargetSet, blocks: list[RenderedBlock], teacher: Teacher) -> dict[str, float]:
    """Median milliseconds of each stage of one block in one thread. ``launch`` is the host's part of the teacher's
    pass, and ``device`` the remaining time of the device."""
    marks: list[list[float]] = []
    device = teacher.device
    for block in islice(cycle(blocks), len(blocks) + 2):
        at = [time.perf_counter()]
        pixels = block.pixels[0].pin_memory() if device.type == "cuda" else block.pixels[0]
        at.append(time.perf_counter())
        images = pixels.to(device, non_blocking=True)
        wait_for(device)
        at.append(time.perf_counter())
        output = teacher(images)
        at.append(time.perf_counter())
        wait_for(device)
        at.append(time.perf_counter())
        arrays, _, _ = encode_tokens(output.tokens, output.attention, targets.layout, calibration=targets.calibration)
        at.append(time.perf_counter())
        pack_block(targets.layout, arrays)
        at.append(time.perf_counter())
        marks.append([1000 * (end - start) for start, end in pairwise(at)])
    names = ("pin", "upload", "launch", "device", "encode", "pack")
    columns = zip(*marks[2:], strict=True)
    return {name: round(statistics.median(times), 3) for name, times in zip(names, columns, strict=True)}


def whole(state: State, found: Found, targets: TargetSet, shards: ShardSet, teacher: Teacher) -> Meter:
    """Extract all views again, into another folder, with the existing calibration."""
    settings = state.clip_settings()
    out = state.scratch / "extracted-again"
    shutil.copytree(targets.root / CODEC_FOLDER, out / CODEC_FOLDER)
    units = {CODEC: targets.artifact.units[CODEC]}
    artifact = TargetsArtifact(out, targets.artifact.identity, units, facts=targets.artifact.facts)
    missing, workers = missing_units(artifact, shards, settings.views), worker_count(settings.speed.workers)
    began = time.perf_counter()
    make_images(
        artifact,
        shards,
        [lacking.shard for lacking in missing],
        settings=settings.view,
        workers=workers,
        report=Silent(),
    )
    found.facts["images reduced a second"] = round(shards.images / (time.perf_counter() - began), 1)
    meter = make_views(artifact, shards, missing, teacher=teacher, settings=settings, workers=workers, report=Silent())
    shutil.rmtree(out)
    return meter
