"""D: does the loader keep up with the device, and are views decoded on the device correct while it is busy?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parts import Found
from benchmarks.gpu.speed import TURN_S, first_batch, in_memory, timed
from benchmarks.gpu.state import State
from benchmarks.harness import at_least, at_most, figures
from benchmarks.pretrain import turn
from cae2pipe.config.base import build
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.images.jpeg import device_decoder
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.device import on_device
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.planning import make_plan
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.compilation import compiles

SHARED = Path("/dev/shm")
BUSY_BATCHES = 50


def loader(state: State, found: Found, pixels: str) -> None:
    """Base fed by 16 workers, with stored or replayed views decoded by the workers or by the device, compared with the
    same step from memory."""
    targets = state.clip_targets(pixels)
    views = len(targets)
    batch = 8 if state.quick else min(state.recall("batch-base", None) or first_batch(state, "base") // 2, views // 2)
    step, one, settings = in_memory(state, "base", batch, compiles(None, state.place))
    timed(lambda: step(one, 1e-6), state.place)
    took = timed(lambda: step(one, 1e-6), state.place)
    # More than the workers prefetch.
    steps = 2 if state.quick else max(8, min(30, round(TURN_S / took)))
    from_memory = turn(step, repeat(one), steps, state.place)
    memory = [from_memory() for _ in range(2)]
    found.rows.append({"fed": "from memory", "views": pixels, "batch": batch, "images/s": figures(memory)})
    decoders = ["workers"]
    try:
        found.facts["the device's decoder"] = device_decoder().__module__
        decoders.append("device")
    except SettingsError as error:
        found.skipped["decoding on the device"] = error.what
    for decode in decoders:
        workers = 2 if state.quick else 16
        waits: list[float] = []
        used = shared_memory()
        with closing(stream(targets, settings, step.model.drop_columns, decode, workers, state)) as batches:
            for _ in range(2):  # the workers start
                step(next(batches), 1e-6).values()
            rate = turn(step, batches, steps, state.place, waits)()
            used = shared_memory() - used
        name = f"by {workers} workers, " + ("decoded by the device" if decode == "device" else "which decode")
        row: dict[str, Any] = {"fed": name, "views": pixels, "batch": batch}
        row |= {"images/s": figures([rate]), "/memory": round(rate / max(memory), 3)}
        row |= {"data_wait": round(waits[0], 4), "shared_memory_gb": round(used / 1e9, 2)}
        found.rows.append(row)
        # Kept even if the part is killed.
        print(row, flush=True)
        found.goals.append(at_least(f"{name}: over the same step from memory", rate / max(memory), 0.95))
    if "device" in decoders:
        decoded_by_device(state, found, targets, settings)


def stream(
    targets: TargetSet, settings: PretrainSettings, columns: int, decode: str, workers: int, state: State
) -> Iterator[Batch]:
    """Batches of a target set on the device."""
    values = settings.model_dump(mode="json")
    values["data"]["decode"] = decode
    plan = make_plan(
        targets, sorted(targets.stores), build(PretrainSettings, values, "the loader"), drop_columns=columns
    )
    # On a CPU tracing it takes longer than all else here; `views.py` does that.
    backend = state.backend if state.on_cuda else None
    return on_device(load_parts(plan, 0, workers), targets.layout.sample_axes(), state.place, backend=backend)


def shared_memory() -> int:
    """Bytes in use in /dev/shm."""
    return shutil.disk_usage(SHARED).used if SHARED.exists() else 0


def decoded_by_device(state: State, found: Found, targets: TargetSet, settings: PretrainSettings) -> None:
    """The device's pixels compared with Pillow's, and fifty batches decoded while the device is busy compared with a
    first pass. On a CPU the same code decodes with libjpeg, as Pillow does.
    """
    if not state.on_cuda:
        found.skipped["nvJPEG"] = "a CPU decodes with libjpeg"
    batch = settings.loaded_batch if state.quick else 64
    data = settings.data.model_copy(update={"batch": batch, "streams": 4})
    settings = settings.model_copy(update={"data": data})
    workers = 0 if state.quick else 4  # a worker takes longer to start than to read
    count = 3 if state.quick else BUSY_BATCHES

    def pixels(decode: str) -> Iterator[Batch]:
        return islice(stream(targets, settings, 0, decode, workers, state), count)

    first = [batch.pixels.clone() for batch in pixels("device")]
    wanted = next(pixels("workers")).pixels
    apart = (first[0].int() - wanted.int()).abs()
    found.facts["device's pixels against Pillow's"] = {
        "mean": round(float(apart.float().mean()), 4),
        "worst": int(apart.max()),
    }
    found.checks.append(at_most("device's pixels against Pillow's, mean difference", float(apart.float().mean()), 2.0))
    different = torch.zeros((), dtype=torch.int64, device=state.place)
    load = Load(state)
    for again, before in zip(pixels("device"), first, strict=True):
        load()
        different += (again.pixels != before).sum()
    found.checks.append(
        at_most(f"pixels of {count} batches that differ while the device is busy", different.item(), 0, 0)
    )


class Load:
    """Queues some milliseconds of work on a device without waiting for it."""

    def __init__(self, state: State):
        side = 64 if state.quick else 8192
        self.matrix: Tensor = torch.randn(side, side, device=state.place) / side**0.5
        self.times = 1 if state.quick else 8

    def __call__(self) -> None:
        product = self.matrix
        for _ in range(self.times):
            product = product @ self.matrix
