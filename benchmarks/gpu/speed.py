"""C: training speed of the students from a batch in memory, at the largest batch that fits, and the kernels used."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.machine import first_line
from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import figures, in_turns
from benchmarks.pretrain import settings_of, top_operations, turn, wait_for
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.methods.registry import build_method
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.runtime.world import World
from cae2pipe.targets.codecs import TokenKltCodec
from cae2pipe.targets.planes import LOW
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.training.alignment import Alignment
from cae2pipe.training.compilation import compiler_advice, compiles
from cae2pipe.training.flops import peak_tflops, training_flops
from cae2pipe.training.objective import Objective, compile_objective
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.step import Step, cached
from cae2pipe.training.telemetry import peak_memory

DIMS = {"large": 768}
"""Dimensions of the teacher's latents if they are not those of CLIP ViT-B/16."""
START = {"large": 512}
"""The first batch to try on a card of 80 GB; 2048 for the others."""
TRIES = 3
SHARE = 0.92
"""Share of the device's memory for a step: a loader's batches need some too."""
TURN_S = 2.0
"""Seconds per turn of measuring."""

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "eager": {},
    "flash": {},
    "recompute": {"speed": {"recompute": True}},
    "accumulation": {"speed": {"accumulation": 4}},
    "official": {"recipe": "official"},
}
"""Settings of the measured variants. flash: attention without cuDNN's kernel."""


def size(state: State, found: Found, name: str, variant: str = "") -> None:
    """Images per second, MFU, peak memory, seconds to compile, and the kernels that take most of the time."""
    if variant == "flash" and not state.on_cuda:
        found.skipped["flash"] = "kernels cannot be chosen on a CPU"
    compiled = variant != "eager" and compiles(None, state.place)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn and variant != "flash")
    take_memory(state, SHARE)
    try:
        step, one, settings, seconds = largest_fitting(state, found, name, VARIANTS[variant], compiled)
        batch = settings.data.batch
        took = timed(lambda: step(one, 1e-6), state.place)
        steps = 2 if state.quick else max(2, min(20, round(TURN_S / took)))
        measured = {"memory": turn(step, repeat(one), steps, state.place)}
        rates = in_turns(measured, 2 if state.quick else 3)["memory"]
        found.facts["card"] = busy_card(state, step, one, took)
        found.facts["kernels"] = top_operations(step, one, state.place)
        loss = step(one, 1e-6).values()["loss"]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        take_memory(state, 1.0)
    found.check("the loss is finite", math.isfinite(loss))
    flops, peak = training_flops(settings, dim_of(state, name)), peak_tflops(state.place, None)
    rate = figures(rates)
    found.rows.append(
        {
            "size": name,
            "variant": variant or ("compiled" if compiled else "eager"),
            "batch": batch,
            "images/s": rate,
            "step_ms": round(1000 * batch / rate["median"], 1),
            "mfu": round(rate["median"] * flops / (peak * 1e12), 3) if peak else None,
            "memory_gb": round(peak_memory(state.place) / 1e9, 1),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1) if state.on_cuda else None,
            "first_step_s": round(seconds, 1),
        }
    )
    found.facts["training gflops an image"] = round(flops / 1e9, 2)
    if not variant:
        state.remember(f"batch-{name}", batch)
        state.remember(f"rate-{name}", rate["median"])


def largest_fitting(
    state: State, found: Found, name: str, over: dict[str, Any], compiled: bool
) -> tuple[Step, Batch, PretrainSettings, float]:
    """A step and its batch after the first call, at the largest batch that fits (halved until it does), and the seconds
    of that call.

    Raises:
        torch.OutOfMemoryError: no batch that was tried fits.
    """
    batch = state.recall(f"batch-{name}", None) or first_batch(state, name)
    for _ in range(TRIES):
        try:
            step, one, settings = in_memory(state, name, batch, compiled, over)
            return step, one, settings, timed(lambda step=step, one=one: step(one, 1e-6), state.place)
        except torch.OutOfMemoryError:
            found.facts.setdefault("does not fit", []).append(batch)
        # Outside the handler, where the failed pass would still hold its memory.
        step = one = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        batch //= 2
    raise torch.OutOfMemoryError(f"{name} fits with none of the batches {found.facts['does not fit']}")


def take_memory(state: State, share: float) -> None:
    """Limit the share of the device's memory for this process."""
    if state.on_cuda:
        torch.cuda.set_per_process_memory_fraction(share, state.place)


def first_batch(state: State, name: str) -> int:
    """A power of two, proportional to the device's memory."""
    if state.quick or not state.on_cuda:
        return 8
    memory = torch.cuda.get_device_properties(state.place).total_memory
    return int(START.get(name, 2048) * min(1.0, 2.0 ** round(math.log2(memory / 80e9))))


def in_memory(
    state: State, name: str, batch: int, compiled: bool, over: dict[str, Any] | None = None
) -> tuple[Step, Batch, PretrainSettings]:
    """The training step of a size, not called yet, and a synthetic batch on the device. Sets torch's backends."""
    over = {
        "data": {"streams": min(64, batch)},
        **({"model": state.scale.model} if state.quick else {}),
        **(over or {}),
    }
    settings = settings_of(name, batch, state.place, over)
    dim = dim_of(state, name)
    torch.manual_seed(0)
    model = build_method(settings.method, settings.model, dim).to(state.place)
    model.recompute(settings.speed.recompute)
    tokens = settings.model.grid**2 + 1
    bases = (torch.linalg.qr(torch.randn(size, size)).Q for size in (dim, tokens))
    codec = TokenKltCodec(torch.zeros(dim), *bases, spread=torch.rand(tokens, dim), step=0.02)
    layout = StoreLayout(tokens, dim, tokens - 1, False, codec)
    bf16 = settings.precision == "bf16"
    mean = torch.nn.functional.normalize(torch.randn(dim), dim=0) / 2
    teacher = Alignment(settings.loss, codec, mean=mean, class_token=True)
    objective = Objective(model, settings.loss, [teacher], bf16=bf16).to(state.place).train()
    world = World(0, 1, state.place)
    if compiled:
        compile_objective(objective, world)
    optimizer = build_optimizer(model, settings.optimizer)
    step = Step(
        objective,
        objective,
        optimizer,
        axes=layout.sample_axes(),
        latents=cached,
        accumulation=settings.speed.accumulation,
        clip=settings.optimizer.clip,
        world=world,
    )
    return step, made_up(settings, layout, model.drop_columns, state.place), settings


def dim_of(state: State, name: str) -> int:
    return state.scale.teacher_width // 2 if state.quick else DIMS.get(name, 512)


def made_up(settings: PretrainSettings, layout: StoreLayout, drop_columns: int, device: torch.device) -> Batch:
    """A batch of noise, made on the device, with the shapes of a loaded one."""
    views, grid, side = settings.data.batch, settings.model.grid, settings.model.image_size
    rng = torch.Generator(device).manual_seed(0)
    masks = [
        split_indices(draw_mask(settings.mask.strategy, grid, grid, settings.masked_patches, "mask", row))
        for row in range(views)
    ]
    visible, masked = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*masks, strict=True))
    arrays = {
        name: torch.zeros(array.shape(views), dtype=torch.int32 if array.dtype == "<i4" else torch.uint8, device=device)
        for name, array in layout.loaded().items()
        if name in layout.loaded_latents()
    }
    arrays[LOW].random_(0, 16, generator=rng)
    return Batch(
        epoch=0,
        step=0,
        real=views,
        pixels=torch.randint(0, 256, (views, 3, side, side), generator=rng, device=device, dtype=torch.uint8),
        jpegs=torch.zeros(0, dtype=torch.uint8),
        sizes=torch.zeros(views, dtype=torch.int64),
        arrays=arrays,
        weights=torch.ones(views, device=device),
        visible=visible,
        masked=masked,
        drop=torch.rand(views, drop_columns, generator=rng, device=device),
        keys=[""] * views,
        views=[0] * views,
    )


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of work including the device's."""
    began = time.perf_counter()
    with compiler_advice():
        work()
    wait_for(device)
    return time.perf_counter() - began


def busy_card(state: State, step: Step, one: Batch, took: float) -> str | None:
    """Power and clock from nvidia-smi while steps are computed."""
    if not state.on_cuda:
        return None
    query = "power.draw,clocks.sm,clocks_event_reasons.active,temperature.gpu"
    for _ in range(max(1, min(50, round(1.0 / took)))):
        step(one, 1e-6)
    line = first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    wait_for(state.place)
    return line
