"""How many images per second does the loader give per core, and does it ever keep a student waiting?

Claims: from stored views with CLIP's latents the loader gives at least 1.8 times the images/s per core of another
checkout of this project (``--against``, the loader before it was rewritten), and 6 times those of WebDataset and
torchvision on the originals. A student that takes batches at 0.9 of the loader's rate waits at most 2% of its time, and
its slowest batch takes at most 3 times the median.

Time is that of all processes on a core, so other work on the machine matters little. Latents have the shape and
spectrum of CLIP ViT-B/16's (197 x 512, klt at 0.999), JPEGs are views of photographs; both are repeated on disk. Each
checkout makes its set and loads it in a process of its own (``feed_child.py``).

    python -m benchmarks.feed [--quick] [--against CHECKOUT] [--streams 64] [--out benchmarks/results/feed-cpu.json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.feed_rivals import write_views
from benchmarks.harness import at_least, at_most, figures, finish, median_ratio, parse_options, print_table
from benchmarks.sample import photographs
from cae2pipe.runtime.processes import worker_count
from cae2pipe.targets.chunks import BLOCK

ROOT = Path(__file__).parents[1]
OURS, AGAINST = "this checkout", "against"
RIVALS = {"originals": "WebDataset + torchvision, originals", "memmap": "fp16 memmap + JPEG folder"}
TRANSPORT = "from a worker to the main process (difference)"
LOAD = 0.9
"""Share of the loader's own rate at which the student takes batches."""
MOST = 500
"""Most batches that the student takes."""
TURNS = 3
WINDOWS = 2
"""Windows of each stream in an epoch: few, so that many first steps of an epoch are among those measured."""


@dataclass(frozen=True)
class Size:
    """How much is loaded. The defaults are those of ``pretrain``, and CLIP's shape.

    Args:
        streams: of the loader. per_stream, window: views per batch of each, and blocks among which it shuffles.
        samples: different views. copied: shards of so many that have bytes of their own; others are links to the first.
        seconds: how long the student takes batches.
        rival_batch, rival_turns: views in the rivals' batches, and batches per turn with up to two workers.
        size, rows, dim: side of a view in pixels, patches along a side, and D.
    """

    streams: int
    samples: int
    copied: int
    seconds: float
    rival_batch: int
    rival_turns: dict[str, int]
    per_stream: int = 32
    window: int = 4
    size: int = 224
    rows: int = 14
    dim: int = 512

    @property
    def data(self) -> dict[str, int]:
        """Settings of ``pretrain``."""
        return {"batch": self.per_stream * self.streams, "streams": self.streams, "window": self.window}

    @property
    def steps(self) -> int:
        """Steps in which a stream gives out a window."""
        return self.window * BLOCK // self.per_stream

    @property
    def shards(self) -> int:
        """Shards of an epoch of ``WINDOWS`` windows in each stream."""
        return WINDOWS * self.streams * self.window * BLOCK // self.samples


FULL = Size(64, 512, 32, 30, 256, {"originals": 4, "memmap": 24})
QUICK = Size(8, 64, 64, 4, 64, {"originals": 4, "memmap": 16})


class Child:
    """A process that measures the checkout ``root``. Raises SystemExit if there is none."""

    def __init__(self, root: Path):
        self.root = root
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", str(Path(__file__).with_name("feed_child.py"))]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found = self("where")
        if found is None or not Path(found).is_relative_to(root.resolve()):
            self.close()
            sys.exit(f"{root} is not a checkout of this project (it would measure {found}): check --against")

    def __call__(self, do: str, **task: Any) -> Any:
        """The answer to a task. Raises SystemExit if the process fails, which has said why."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **task}) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"the process that measures {self.root} ended with {self._process.wait()} at {do!r}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    options = parse_options(
        __doc__,
        against={"type": Path, "help": "another checkout of this project, whose loader is measured too"},
        streams={"type": int, "help": "streams, and 32 times as many views per batch: fewer need less memory"},
    )
    size = QUICK if options.quick else FULL
    if options.streams:
        size = replace(size, streams=options.streams)
    checkouts = {OURS: ROOT} | ({AGAINST: options.against.resolve()} if options.against else {})
    workers = sorted({1, 2, worker_count(-1)})
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        roots = checkouts | dict.fromkeys(RIVALS.values(), ROOT)
        children = {name: stack.enter_context(Child(root)) for name, root in roots.items()}
        report = measure(children, size, workers, Path(folder))
    print_table("milliseconds of a loaded image, one core", report.profiles)
    settings = {
        "against": revision(options.against) if options.against else None,
        "load before": round(busy, 1),
        "sets": report.sets,
        "profiles": report.profiles,
        **asdict(size),
    }
    finish(options, "feed", report.rows, report.checks, settings, ("torch", "torchvision", "webdataset", "pillow"))


@dataclass
class Report:
    """What was measured: rows, claims, profiles, and what is in the sets."""

    rows: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    profiles: list[dict[str, Any]]
    sets: dict[str, Any]


def measure(children: dict[str, Any], size: Size, workers: Sequence[int], scratch: Path) -> Report:
    """The rates of all loaders with so many workers, in turns; then the student's waits with the most of them.

    Args:
        children: by the names of the loaders: ``OURS``, perhaps ``AGAINST``, and the rivals'.
    """
    checkouts = [name for name in (OURS, AGAINST) if name in children]
    roots = {name: str(scratch / f"set-{number}") for number, name in enumerate(checkouts)}
    source = photograph_folder(scratch, size.samples)
    more: dict[str, Any] = {"shape": {"size": size.size, "rows": size.rows, "dim": size.dim}}
    more |= {"samples": size.samples, "copied": size.copied, "shards": size.shards}
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda name: children[name]("make", source=str(source), out=roots[name], **more), checkouts)
        sets = dict(zip(checkouts, made, strict=True))
    write_views(Path(roots[OURS]), scratch / "memmap", size.rows**2 + 1, size.dim, 8 * size.rival_batch)
    loaders = {name: Loader(children[name], "ours", roots[name], size.data, size.steps) for name in checkouts}
    for kind, root in (("originals", roots[OURS]), ("memmap", str(scratch / "memmap"))):
        name, data = RIVALS[kind], {"batch": size.rival_batch}
        loaders[name] = Loader(children[name], kind, root, data, size.rival_turns[kind])

    found = {(name, count): turns for count in workers for name, turns in rates(loaders, count).items()}
    rows = {key: row(*key, turns) for key, turns in found.items()}
    profiles = []
    for name in checkouts:
        few, most = rows[name, min(workers)], rows[name, max(workers)]
        interval = size.data["batch"] / most["images/s"]["median"] / LOAD
        count = min(MOST, max(size.steps, round(size.seconds / interval)))
        place = {"root": roots[name], "data": size.data}
        waits = children[name]("consume", workers=max(workers), count=count, interval=interval, **place)
        most.update(waiting(waits, interval))
        spent = children[name]("profile", count=size.steps, **place)
        profiles.append({"loader": name, **profiled(spent, 1000 / few["images/s per core"]["median"])})
    cores = {key: [turn["core"] for turn in turns] for key, turns in found.items()}
    return Report(list(rows.values()), claims(cores, rows[OURS, max(workers)]), profiles, sets)


@dataclass(frozen=True)
class Loader:
    """A loader and the process where it runs. ``turn``: batches per turn with up to two workers."""

    child: Any
    kind: str
    root: str
    data: dict[str, int]
    turn: int


def rates(loaders: dict[str, Loader], workers: int) -> dict[str, list[dict[str, float]]]:
    """The rates of all loaders with so many workers in ``TURNS`` turns each."""

    def start(loader: Loader) -> None:
        loader.child("open", kind=loader.kind, root=loader.root, workers=workers, data=loader.data)

    with ThreadPoolExecutor() as pool:
        list(pool.map(start, loaders.values()))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    for _ in range(TURNS):
        for name, loader in loaders.items():
            found[name].append(loader.child("take", count=loader.turn * max(2, workers) // 2))
    for loader in loaders.values():
        loader.child("close")
    return found


def photograph_folder(scratch: Path, count: int) -> Path:
    """A folder of ``count`` photographs, which are repeated as often as needed."""
    source = sorted(path for path in photographs(scratch, min(count, 100)).rglob("*") if path.is_file())
    for number in range(count):
        path = source[number % len(source)]
        target = scratch / "originals" / path.parent.name / f"{number}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return scratch / "originals"


def row(name: str, workers: int, turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A loader's rate with a number of workers: per core, and as the clock has it."""
    return {
        "loader": name,
        "workers": workers,
        "images/s per core": figures([turn["core"] for turn in turns], 0),
        "images/s": figures([turn["clock"] for turn in turns], 0),
    }


def waiting(waits: Sequence[float], interval: float) -> dict[str, Any]:
    """How long a student waits that takes a batch, works for ``interval`` seconds, and asks for the next one. A batch
    takes both together."""
    taken = [wait + interval for wait in waits]
    return {
        "batches": len(waits),
        "interval_ms": round(1000 * interval, 1),
        "waited": round(sum(waits) / sum(taken), 4),
        "slowest / median": round(max(taken) / statistics.median(taken), 2),
    }


def profiled(found: dict[str, Any], one: float) -> dict[str, float]:
    """Milliseconds per image by what was done. ``one``: those of an image that one worker hands over."""
    each = {what: 1000 * seconds / found["images"] for what, seconds in found["spent"].items()}
    each[TRANSPORT] = one - sum(each.values())
    largest = sorted(each.items(), key=lambda item: -item[1])
    return {what: round(milliseconds, 3) for what, milliseconds in largest if abs(milliseconds) >= 0.0005}


def claims(cores: dict[tuple[str, int], list[float]], student: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims; those on rates with the number of workers for which they are hardest.

    Args:
        cores: images/s per core of each turn, by loader and workers. student: how it waited, as of ``waiting``.
    """

    def over(rival: str, goal: float) -> dict[str, Any]:
        counts = [count for name, count in cores if name == rival]
        ratio, count = min((median_ratio(cores[OURS, count], cores[rival, count]), count) for count in counts)
        return at_least(f"images/s per core over {rival}, workers: {count}", ratio, goal, 2)

    return [
        *([over(AGAINST, 1.8)] if any(name == AGAINST for name, _ in cores) else []),
        over(RIVALS["originals"], 6),
        at_most(f"share of time waited at {LOAD} of the rate", student["waited"], 0.02, 4),
        at_most("slowest batch over the median", student["slowest / median"], 3, 2),
    ]


def revision(checkout: Path) -> str:
    """The commit of a checkout, for the result."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
