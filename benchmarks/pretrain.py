"""Does the pipeline slow down the student's training?

Claims: training from cached targets reaches at least 0.95 of the images/s of the same step fed from memory; compared
with an online teacher on the same stored views, it reaches 0.9 of the speed-up that the arithmetic allows. The online
run on fresh crops of the originals, as published, is measured too. The teachers are CLIP ViT-B/16 (for Large: ViT-L/14
at 196 pixels) with random weights, on which speed does not depend.

    python -m benchmarks.pretrain [--quick] [--device cpu] [--sizes tiny,small] [--batch 8] [--out FILE.json]
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import at_least, figures, finish, in_turns, median_ratio, parse_options, print_table
from benchmarks.sample import copies, packed, photographs, random_weights
from cae2pipe.config.base import load, merge
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.device import on_device
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.device import pick_device, resolve_precision, set_backends
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import World
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.training.flops import forward_flops, peak_tflops, training_flops
from cae2pipe.training.objective import compile_objective, make_objective
from cae2pipe.training.online import OnlineLatents
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.step import Latents, Step, cached
from cae2pipe.training.target_spec import target_spec
from cae2pipe.training.telemetry import peak_memory

SIZES = {"tiny": "clip-b16", "small": "clip-b16", "base": "clip-b16", "large": "clip-l14-196"}
IMAGENET, EPOCHS = 1_281_167, 300


def main() -> None:
    options = parse_options(
        __doc__,
        sizes={"default": ",".join(SIZES), "help": "sizes to measure"},
        batch={"type": int, "default": 8, "help": "images per step"},
        steps={"type": int, "default": 0, "help": "steps per turn; 0: 2 on a CPU, 50 on a device"},
    )
    device = pick_device(options.device)
    rows, checks, costs = [], [], []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sets: dict[str, tuple[TargetSet, Path]] = {}
        source = copies(photographs(scratch, 100), scratch, max(1, -(-options.batch // 32)))
        chosen = load(ExtractSettings, "extract", "clip-b16")
        shards = packed(source, scratch, chosen)
        for size in options.sizes.split(","):
            preset = SIZES[size]
            if preset not in sets:
                sets[preset] = make_targets(shards, scratch, preset, options.device)
            found = measure(size, *sets[preset], shards.root, options, device)
            rows += found["rows"]
            checks += found["checks"]
            costs += found["costs"]
            details[size] = found["details"]
    print_table(f"hours on this device for ImageNet-1K, {EPOCHS} epochs, computed from the rates below", costs)
    more = {"batch": options.batch, "computed_hours": costs, "details": details}
    finish(options, "pretrain", rows, checks, more, ("torch", "timm", "open_clip_torch"))


def make_targets(shards: ShardSet, scratch: Path, preset: str, device: str) -> tuple[TargetSet, Path]:
    """A target set of one view from a CLIP tower with random weights, and the file of the weights."""
    weights = random_weights(preset, scratch)
    values = {"teacher": {"weights": str(weights), "pretrained": None}, "speed": {"device": device}, "views": 1}
    settings = load(ExtractSettings, "extract", preset, overrides=(), values=values)
    extract_targets(shards.root, scratch / preset, settings, report=Silent())
    return TargetSet(scratch / preset), weights


def measure(
    size: str, targets: TargetSet, weights: Path, originals: Path, options: Any, device: torch.device
) -> dict[str, Any]:
    """Rates of one size, in turns."""
    steps = options.steps or (2 if device.type == "cpu" else 50)
    if device.type == "cpu" and size == "large":
        steps = 1
    teacher = set_teacher(targets.artifact, weights, device, option="")
    settings = settings_of(size, options.batch, device)
    torch.manual_seed(0)
    spec = target_spec(settings, targets)
    model = build_method(settings.method, settings.model, spec.dim, spec.summary).to(device)
    objective = make_objective(model, targets, settings).to(device).train()
    world = World(0, 1, device)
    if device.type == "cuda":
        compile_objective(objective, world)
    optimizer = build_optimizer(model, settings.optimizer)

    def step_with(latents: Latents) -> Step:
        axes = targets.layout.sample_axes()
        return Step(objective, objective, optimizer, axes=axes, latents=latents, accumulation=1, clip=3.0, world=world)

    def stream(over: PretrainSettings) -> Iterator[Batch]:
        plan = make_plan(targets, sorted(targets.stores), over, drop_columns=model.drop_columns)
        return on_device(load_parts(plan, 0, worker_count(-1)), plan.sample_axes(), device)

    one = next(stream(settings))
    online = settings.model_copy(update={"targets": "online"})
    fresh = online.model_copy(update={"views": "fresh", "originals": originals})
    waits: list[float] = []
    contenders = {
        "memory": turn(step_with(cached), itertools.repeat(one), steps, device),
        "cached": turn(step_with(cached), stream(settings), steps, device, waits),
        "online": turn(step_with(OnlineLatents(teacher)), stream(online), steps, device),
        "fresh": turn(step_with(OnlineLatents(teacher)), stream(fresh), steps, device),
        "teacher": teacher_turn(teacher, one, steps, device),
    }
    rates = in_turns(contenders, 2 if options.quick else 5)
    profile = top_operations(step_with(cached), one, device)
    del contenders
    gc.collect()
    student = training_flops(settings, targets.teacher.dim)
    ceiling = (student + teacher_flops(teacher, one)) / student
    peak = peak_tflops(device, None)
    kept = median_ratio(rates["cached"], rates["memory"])
    gained = median_ratio(rates["cached"], rates["online"])
    row: dict[str, Any] = {"size": size} | {name: figures(values, 2) for name, values in rates.items()}
    row |= {"/memory": round(kept, 3), "/online": round(gained, 2), "ceiling": round(ceiling, 2)}
    details = {
        "units": "images per second",
        "gmacs": round(forward_flops(settings, targets.teacher.dim) / 2e9, 2),
        "cached_over_fresh": round(median_ratio(rates["cached"], rates["fresh"]), 2),
        "data_wait": round(sum(waits) / len(waits), 4),
        "mfu": round(max(rates["cached"]) * student / (peak * 1e12), 3) if peak else None,
        "memory_gb": round(peak_memory(device) / 1e9, 1),
        "profile": profile,
    }
    checks = [
        at_least(f"{size}: cached over the same step from memory", kept, 0.95),
        at_least(f"{size}: cached over online, share of the ceiling {ceiling:.2f}", gained / ceiling, 0.9),
    ]
    return {"rows": [row], "checks": checks, "costs": cost_rows(size, rates), "details": details}


def settings_of(size: str, batch: int, device: torch.device, over: dict[str, Any] | None = None) -> PretrainSettings:
    """A size's preset at a batch, with unlimited epochs, overridden by ``over``."""
    values = {"epochs": 100_000, "data": {"batch": batch, "streams": min(8, batch)}}
    settings = load(PretrainSettings, "pretrain", size, overrides=(), values=merge(values, over or {}))
    settings = settings.model_copy(update={"precision": resolve_precision("auto", device)})
    set_backends(settings.precision == "bf16", fixed_shapes=True)
    return settings


def turn(
    step: Step, batches: Iterator[Batch], steps: int, device: torch.device, waits: list[float] | None = None
) -> Callable[[], float]:
    """A measure: images/s over some steps, including the loader's work."""

    def run() -> float:
        began, waited, images = time.perf_counter(), 0.0, 0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            step(batch, 1e-6)
            images += len(batch.visible)
        wait_for(device)
        seconds = time.perf_counter() - began
        if waits is not None:
            waits.append(waited / seconds)
        return images / seconds

    return run


def teacher_turn(teacher: Teacher, batch: Batch, steps: int, device: torch.device) -> Callable[[], float]:
    """A measure: views/s of the teacher's forward pass alone."""

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            teacher(batch.pixels)
        wait_for(device)
        return steps * len(batch.pixels) / (time.perf_counter() - began)

    return run


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def teacher_flops(teacher: Teacher, batch: Batch) -> int:
    """Operations of the teacher's forward pass of one image."""
    # Fused attention is one operation, which the counter does not know.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        teacher(batch.pixels[:1])
    torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def top_operations(step: Step, batch: Batch, device: torch.device, most: int = 6) -> dict[str, float]:
    """The operations with the largest shares of a step's time."""

    def work() -> None:
        step(batch, 1e-6)
        wait_for(device)

    work()
    return shares(work, device, most)


def shares(work: Callable[[], None], device: torch.device, most: int) -> dict[str, float]:
    """The kernels (on a CPU: operations) that take most of the time of ``work``, which must wait for the device, each
    with its share of their total time."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    # Torch 2.11 warns if events are not accumulated, although there is only one cycle.
    with profile(activities=[activity], acc_events=True) as profiler:
        work()
    times = {
        event.key: event.self_device_time_total if on_cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(times.values()) or 1.0
    largest = sorted(times.items(), key=lambda item: -item[1])[:most]
    return {name[:60]: round(value / total, 3) for name, value in largest}


def cost_rows(size: str, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Hours on this device for ImageNet-1K over 300 epochs: V views extracted once and trained from, or online."""
    median = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    student = EPOCHS * IMAGENET / median["cached"]
    hours = {f"V={views}": student + views * IMAGENET / median["teacher"] for views in (1, 4, 8, 16)}
    hours["online"] = EPOCHS * IMAGENET / median["online"]
    hours["online, fresh crops"] = EPOCHS * IMAGENET / median["fresh"]
    return [{"size": size, **{name: round(seconds / 3600) for name, seconds in hours.items()}}]


if __name__ == "__main__":
    main()
