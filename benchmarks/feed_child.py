"""The process in which ``benchmarks.feed`` measures one checkout of this project.

It runs as a script with that checkout in PYTHONPATH, reads tasks from standard input and writes answers to standard
output, one JSON object per line. It uses nothing else of benchmarks/, and only names of cae2pipe that the checkouts to
be compared have: where they differ, ``batches`` and ``make`` must look for what is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

SPREADS = {
    1: 1410.0,
    3: 595.0,
    10: 200.0,
    30: 93.8,
    100: 35.1,
    300: 22.5,
    1000: 11.7,
    3000: 6.76,
    10_000: 3.68,
    20_000: 2.24,
    40_000: 0.921,
    60_000: 0.413,
    80_000: 0.167,
    90_000: 0.0874,
    100_000: 0.0317,
    100_864: 0.0195,
}
"""Root mean squares of drawn coefficients by their rank among 197 x 512, in steps of the codec. Once tokens are scaled
to unit length, the coefficients that ``klt`` at 0.999 stores have the spectrum of CLIP ViT-B/16 with random weights on
ImageNet photographs within 3% up to rank 60,000, and take the same 25 kB per view."""
STEP = 0.00676
"""The codec's step there."""
CENTRE = 0.335
"""Norm of the mean token there."""
DROP_COLUMNS = 26
"""Columns of drop path that Small takes: two for each of its 13 blocks."""
WARM = 2
"""Uncounted first batches: as many as a worker makes ahead."""
SAMPLING_S = 0.002
PLACES = (
    ("cae2pipe/images/", None, "decoding JPEGs"),
    ("cae2pipe/models/masks.py", None, "masks"),
    ("cae2pipe/targets/", None, "reading, unpacking"),
    ("cae2pipe/artifacts/storage.py", None, "reading, unpacking"),
    ("cae2pipe/loading/batches.py", "gather", "gathering latents"),
    ("cae2pipe/loading/batches.py", "_read", "joining a window's blocks"),
    ("cae2pipe/loading/batches.py", "join", "joining the workers' parts"),
    ("cae2pipe/loading/", None, "the rest of a batch"),
)
"""What a line of code is counted as in a profile, by a part of its file's path and its function (None: any). The first
that fits the innermost frame counts, or else that of its caller, and so on."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # An editable install would add its own modules to those of the checkout.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    known = tasks()
    try:
        for line in sys.stdin:
            task = json.loads(line)
            print(json.dumps(known[task.pop("do")](**task)), file=answers, flush=True)
    finally:
        tell(signal.SIGCONT)  # stopped workers could not end


def where() -> str | None:
    """The file of cae2pipe that this process would import."""
    found = importlib.util.find_spec("cae2pipe")
    return found.origin if found else None


def make(source: str, out: str, shape: dict[str, int], *, samples: int, copied: int, shards: int) -> dict[str, Any]:
    """Make the target set ``out``, by this checkout's code. Returns its number of views, and the bytes of each.

    Args:
        source: a folder of photographs, of each of which there is one stored view. shape: of views and latents, as
            ``drawn_teacher`` takes it.
        samples: how many there are, which make one shard. It is repeated until there are ``shards``, the first
            ``copied`` of them with bytes of their own on disk, the others as links.
    """
    from cae2pipe.config.base import load
    from cae2pipe.config.extract import ExtractSettings
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.targets.target_set import TargetSet

    stage = importlib.import_module("cae2pipe.stages.extract_targets")
    values = {
        "views": 1,
        "view": {"pixels": "stored", "size": shape["size"]},
        "codec": {"name": "klt", "fidelity": 0.999, "calibration": 64},
        "shard": {"samples": samples},
        "speed": {"device": "cpu", "workers": 0, "lanes": 1},
    }
    settings = load(ExtractSettings, "extract", "clip-b16", overrides=(), values=values)
    real, stage.load_teacher = stage.load_teacher, lambda *_, **__: drawn_teacher(**shape)
    try:
        stage.extract_targets(Path(source), Path(out), settings, report=Silent())
    finally:
        stage.load_teacher = real
    repeat(Path(out), copied, shards)
    targets = TargetSet(Path(out))
    stored = [unit["bytes"] for unit in targets.stores.values()]
    views = sum(unit["samples"] for unit in targets.stores.values())
    return {"views": views, **{part: sum(size[part] for size in stored) // views for part in ("latents", "pixels")}}


def repeat(root: Path, copied: int, shards: int) -> None:
    """Add shards with the content of a set's first one until there are ``shards``."""
    from cae2pipe.artifacts.artifact import TargetsArtifact

    artifact = TargetsArtifact.open(root)
    (name, unit), *_ = ((name, unit) for name, unit in sorted(artifact.units.items()) if "view" in unit)
    first = unit["shard"]
    for number in range(1, shards):
        new = f"{number:0{len(first)}d}"
        place = copy if number < copied else os.link
        for path in unit["files"]:
            target = root / renamed(path, first, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            place(root / path, target)
        artifact.add(renamed(name, first, new), {**renamed(unit, first, new), "shard": new})
    artifact.save()


def copy(source: Path, target: Path) -> None:
    """A copy in bytes of its own: ``shutil.copy`` may share the blocks of a file where the file system can."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)


def renamed(value: Any, old: str, new: str) -> Any:
    """A manifest's value with the name of a shard replaced in all paths."""
    if isinstance(value, dict):
        return {renamed(key, old, new): renamed(item, old, new) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    head, slash, tail = value.partition(f"/{old}")
    return f"{head}/{new}{tail}" if slash else value


def drawn_teacher(size: int, rows: int, dim: int) -> Any:
    """A teacher whose tokens have the spectrum ``SPREADS``, and depend only on the view's pixels.

    Args:
        size: side of a view in pixels. rows: patches along a side. dim: D.
    """
    import numpy as np
    import torch

    from cae2pipe.teachers.protocol import Teacher, TeacherInfo, TeacherOutput

    tokens = rows * rows + 1
    # Every direction along the tokens must reach all of them alike, or tokens would not be of equal length.
    angles = np.pi / tokens * (np.arange(tokens)[:, None] + 0.5) * np.arange(tokens)
    cosines = np.cos(angles) * np.sqrt(np.where(np.arange(tokens), 2, 1) / tokens)
    order = np.argsort(np.log1p(np.arange(tokens))[:, None] + np.log1p(np.arange(dim)), axis=None, kind="stable")
    ranks = np.empty(tokens * dim)
    # A smaller shape has the same spectrum with fewer ranks.
    ranks[order] = 1 + np.arange(tokens * dim) * (197 * 512 / (tokens * dim))
    spread = np.exp(np.interp(np.log(ranks), np.log(list(SPREADS)), np.log(list(SPREADS.values())))) * STEP
    # The logistic distribution has about the tails that were measured; its variance is pi^2 / 3.
    scale = (spread * (math.sqrt(3) / math.pi)).reshape(tokens, dim).astype(np.float32)
    centre = np.full(dim, CENTRE / math.sqrt(dim), dtype=np.float32)

    class Drawn(Teacher):
        def __call__(self, pixels: Any) -> Any:
            images = pixels.contiguous().numpy()
            drawn = []
            for image in images:
                uniform = np.random.default_rng(zlib.crc32(image)).random((tokens, dim), dtype=np.float32)
                coefficients = np.log(np.maximum(uniform, 1e-7) / np.maximum(1 - uniform, 1e-7)) * scale
                drawn.append(centre + cosines.astype(np.float32) @ coefficients)
            return TeacherOutput(torch.from_numpy(np.stack(drawn)), None)

        def tokens(self, pixels: Any) -> Any:
            raise NotImplementedError

    third = (0.5, 0.5, 0.5)
    info = TeacherInfo(
        library="none",
        name="drawn",
        architecture={},
        weights="none",
        dim=dim,
        rows=rows,
        cols=rows,
        class_token=True,
        image_size=size,
        mean=third,
        std=third,
        precision="fp32",
    )
    return Drawn(info, torch.device("cpu"))


def batches(root: str, workers: int, data: dict[str, int], *, joined: bool = True) -> Generator[Any, None, None]:
    """Endless batches of a target set, as ``pretrain`` takes them, for a student of its view size.

    Args:
        data: ``batch``, ``streams`` and ``window``.
        joined: as on a CPU. Otherwise each is a list of the workers' parts, which a GPU joins.
    """
    import torch

    from cae2pipe.config.base import load
    from cae2pipe.config.pretrain import PretrainSettings
    from cae2pipe.loading.device import on_device
    from cae2pipe.loading.loader import load_parts
    from cae2pipe.targets.target_set import TargetSet

    # Its module depends on the checkout.
    names = ("cae2pipe.loading.planning", "cae2pipe.loading.plan")
    make_plan = importlib.import_module(next(filter(importlib.util.find_spec, names))).make_plan
    targets = TargetSet(Path(root))
    values = {"epochs": 10**6, "data": data, "model": {"image_size": targets.view_size}}
    settings = load(PretrainSettings, "pretrain", "small", overrides=(), values=values)
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=DROP_COLUMNS)
    with closing(load_parts(plan, 0, workers)) as parts:
        yield from on_device(parts, targets.layout.sample_axes(), torch.device("cpu")) if joined else parts


def stream(kind: str, root: str, workers: int, data: dict[str, int]) -> Generator[Any, None, None]:
    """Endless batches of ``batches``, or of a loader in ``benchmarks.feed_rivals``."""
    if kind == "ours":
        return batches(root, workers, data)
    rivals = importlib.import_module("benchmarks.feed_rivals")
    return rivals.RIVALS[kind](Path(root), workers, data["batch"])


class Turns:
    """A loader that takes turns with others: between its turns its workers are stopped."""

    def open(self, kind: str, root: str, workers: int, data: dict[str, int]) -> None:
        """Start the loader, up to its first ``WARM`` batches. Arguments as of ``stream``."""
        self._loader, self._batch = stream(kind, root, workers, data), data["batch"]
        for _ in range(WARM):
            next(self._loader)
        tell(signal.SIGSTOP)

    def take(self, count: int) -> dict[str, float]:
        """Take so many batches. Returns images per second of the clock, and of all processes on a core."""
        began, busy = time.perf_counter(), busy_seconds()
        tell(signal.SIGCONT)
        for _ in range(count):
            next(self._loader)
        tell(signal.SIGSTOP)
        images = count * self._batch
        # On a core at least one tick, which only tests do not reach.
        core = max(busy_seconds() - busy, 0.01)
        return {"clock": images / (time.perf_counter() - began), "core": images / core}

    def close(self) -> None:
        """End the loader."""
        tell(signal.SIGCONT)
        self._loader.close()


def consume(root: str, workers: int, data: dict[str, int], *, count: int, interval: float) -> list[float]:
    """The seconds that a GPU waited for each of ``count`` batches, if it works for ``interval`` seconds on each.

    As in ``pretrain``, the host asks for the next batch while the GPU works on the one before, and never gets further
    ahead. The first batch of all, for which workers start, is not counted; the first steps of all epochs are."""
    with closing(batches(root, workers, data, joined=False)) as loader:
        next(loader)
        done = time.perf_counter() + interval
        waits = []
        for _ in range(count):
            next(loader)
            came = time.perf_counter()
            waits.append(max(0.0, came - done))
            time.sleep(max(0.0, done - came))
            done = max(came, done) + interval
        return waits


def profile(root: str, data: dict[str, int], *, count: int) -> dict[str, Any]:
    """Where the time of ``count`` batches goes that are made in this process: seconds by what was done, of all
    threads. Each sample counts the time since the one before, since Python takes a signal only when a call into C
    ends."""
    spent: Counter[str] = Counter()
    seen = 0.0

    def sample(_: int, frame: FrameType | None) -> None:
        nonlocal seen
        now = time.thread_time()
        spent[place(frame)] += now - seen
        seen = now

    with closing(batches(root, 0, data)) as loader:
        previous = signal.signal(signal.SIGPROF, sample)
        began = seen = time.thread_time()
        all_threads = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SAMPLING_S, SAMPLING_S)
        try:
            for _ in range(count):
                next(loader)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)
        own, whole = time.thread_time() - began, time.process_time() - all_threads
    spent["elsewhere"] += own - sum(spent.values())
    spent["other threads"] += whole - own
    return {"images": count * data["batch"], "spent": dict(spent)}


def place(frame: FrameType | None) -> str:
    """What a frame is counted as."""
    while frame is not None:
        code, frame = frame.f_code, frame.f_back
        if code.co_name.startswith("<"):  # a generator expression is counted as the function that it is in
            continue
        for path, function, what in PLACES:
            if path in code.co_filename and function in (None, code.co_name):
                return what
    return "elsewhere"


def busy_seconds() -> float:
    """Seconds that this process and all that it has started, and they in turn, have run on a core."""
    return sum(seconds for _, seconds in family()) / os.sysconf("SC_CLK_TCK")


def tell(number: signal.Signals) -> None:
    """Send a signal to all processes that this one has started, and they in turn."""
    for process, _ in family():
        if process != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(process, number)


def family() -> list[tuple[int, int]]:
    """This process and all its descendants, each with the ticks that it and its ended children have run."""
    parents, used = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:  # it has ended
                continue
            # The name, in brackets, may hold anything.
            fields = text.rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = sum(map(int, fields[11:15]))
    own = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in own} - own:
        own |= more
    return [(process, used[process]) for process in own]


def tasks() -> dict[str, Callable[..., Any]]:
    """What this process can be asked to do, by name."""
    turns = Turns()
    return {
        "where": where,
        "make": make,
        "open": turns.open,
        "take": turns.take,
        "close": turns.close,
        "consume": consume,
        "profile": profile,
    }


if __name__ == "__main__":
    main()
