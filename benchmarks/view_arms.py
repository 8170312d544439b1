"""The arms of benchmarks/views.py: their target sets and runs, made or reused in one folder."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness import real_folder
from benchmarks.sample import settings as stage_1
from benchmarks.sample import write_noise
from cae2pipe.artifacts.artifact import is_artifact, open_artifact
from cae2pipe.config.base import load
from cae2pipe.config.extract import CodecSettings, ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import LockedError, Terminated
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.progress import Report, progress
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.targets.target_set import TargetSet

T = TypeVar("T")

NAME = re.compile(r"(?:v(?P<views>\d+)(?:-k(?P<digits>\d+))?|fresh)-s(?P<seed>\d+)")
HELD_OUT_VIEWS = 4


@dataclass(frozen=True)
class Arm:
    """One run: ``targets`` is the name of its target set, ``views`` the number of that set's views to use."""

    name: str
    targets: str
    views: int
    fidelity: float
    seed: int


@dataclass(frozen=True)
class Bench:
    """Common inputs of all arms. ``data`` contains train and val; ``size`` is a view's side in pixels."""

    work: Path
    data: Path
    size: int
    epochs: int
    keep: int
    stored: int
    device: str
    quick: bool

    @property
    def test_images(self) -> int:
        return sum(1 for path in (self.data / "val").rglob("*") if path.is_file())

    def run(self, arm: Arm) -> Path:
        return self.work / "runs" / arm.name

    def stage_1(self, views: int, codec: dict[str, Any]) -> ExtractSettings:
        workers = {"workers": 0 if self.quick else -1}
        over = {
            "view": {"size": self.size, "pixels": "stored"},
            "shard": {"speed": workers},
            "speed": {"device": self.device, **workers},
        }
        chosen = stage_1(self.device, self.work, views=views, codec=codec, **over)
        return chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update={"image_size": self.size})})

    def training(self, arm: Arm) -> PretrainSettings:
        """The student of an arm: equal steps for all, and a checkpoint kept every ``keep`` epochs."""
        on_cuda = self.device.startswith("cuda")
        values = {
            "epochs": self.epochs,
            "seed": arm.seed,
            "precision": "fp32",
            "model": {
                "width": 96,
                "depth": 4,
                "heads": 3,
                "image_size": self.size,
                "predictor_depth": 1,
                "predictor_width": 96,
                "predictor_heads": 3,
                "layer_scale": 1.0,
                "predictor_layer_scale": 1.0,
                "drop_path": 0,
            },
            "mask": {"ratio": 0.25},
            "data": {"batch": 64, "streams": 8, "views": arm.views},
            "optimizer": {"lr": 2e-3, "scale_lr": False, "warmup_epochs": min(5, self.epochs / 2)},
            "speed": {
                "device": self.device,
                # Many such students share a GPU, which none of them fills; compiling each would take a minute.
                "compile": False,
                "workers": int(on_cuda),
                "keep_epochs": self.keep,
            },
        }
        return load(PretrainSettings, "pretrain", "small", overrides=(), values=values)

    def targets(self, name: str, report: Report) -> Path:
        """A target set by name, made if it is missing: ``v32`` has fp16 latents of 32 views, ``k999`` the same recoded,
        ``fresh`` one view per epoch, ``held`` the val images."""
        root = self.work / name
        if name.startswith("k"):
            source = self.targets(f"v{self.stored}", report)
            if not self.holds(root, self.stored):
                recode(source, root, CodecSettings(fidelity=fidelity_of(name[1:])), report=report)
            return root
        made: dict[str, tuple[str, int, dict[str, Any]]] = {
            "held": ("val", HELD_OUT_VIEWS, {"name": "fp16"}),
            "fresh": ("train", self.epochs, {"name": "klt", "fidelity": 0.999}),
            f"v{self.stored}": ("train", self.stored, {"name": "fp16"}),
        }
        part, views, codec = made[name]
        if not self.holds(root, views):
            extract_targets(self.data / part, root, self.stage_1(views, codec), report=report)
        return root

    def holds(self, root: Path, views: int) -> bool:
        """Whether a target set is finished and has ``views`` views."""
        return is_artifact(root, "targets") and open_artifact(root).complete and TargetSet(root).views >= views


def fill_in(options: Namespace, **values: tuple[int, int]) -> None:
    """Set the options that were not given: to the first of their values, or with ``--quick`` to the second."""
    for name, (full, quick) in values.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)


def make_bench(options: Namespace, epochs: int) -> Bench:
    """The inputs of an experiment on views of 112 pixels, with ``--quick`` of 32 and few images, on one core."""
    torch.set_num_threads(1)
    set_backends()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = quick_images(work) if options.quick else all_images()
    return Bench(work, data, 32 if options.quick else 112, epochs, epochs, options.views, options.device, options.quick)


def interruptible(name: str, work: Callable[[Report], T]) -> T:
    """The result of ``work``, with its progress; ends the process if it is stopped."""
    with progress(name) as report:
        try:
            return work(report)
        except (KeyboardInterrupt, Terminated):
            sys.exit("stopped; rerun the same command to resume")


def all_images() -> Path:
    real = real_folder()
    return real / "imagenette" if real else sys.exit("without CAE2PIPE_REAL only --quick is available")


def quick_images(work: Path, train: int = 10, val: int = 4) -> Path:
    """The first images of each class, or noise without real data, in ``work``."""
    real, root = real_folder(), work / "images"
    for part, count in (("train", train), ("val", val)):
        if (root / part).is_dir():
            continue
        if real is None:
            for number in range(8):
                # Noise depends on its size, so each class has its own.
                write_noise(root / part / f"class{number}", count, (96 + 4 * number, 72))
            continue
        for kind in sorted((real / "imagenette" / part).iterdir()):
            (root / part / kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[:count]:
                shutil.copy(path, root / part / kind.name)
    return root


def fidelity_of(digits: str) -> float:
    """``999`` is 0.999."""
    return float(f"0.{digits}")


def parse_arm(name: str, bench: Bench) -> Arm:
    """``v32-s0``: 32 views at 0.999, seed 0; ``v32-k97-s0``: at 0.97; ``fresh-s0``: a fresh crop in every epoch."""
    match = NAME.fullmatch(name)
    if not match:
        sys.exit(f"{name!r} is not an arm: use v32-s0, v32-k97-s0 or fresh-s0 for 32 views, fidelity 0.97, seed 0")
    seed = int(match["seed"])
    if not match["views"]:
        return Arm(name, "fresh", bench.epochs, 0.999, seed)
    digits, views = match["digits"] or "999", int(match["views"])
    if not 1 <= views <= bench.stored:
        sys.exit(f"{name}: the set has {bench.stored} views; use --stored {views}")
    return Arm(name, f"k{digits}", views, fidelity_of(digits), seed)


def trained(bench: Bench, arms: Sequence[Arm], jobs: int, report: Report) -> Generator[Arm, None, None]:
    """Yields arms when they are trained, ``jobs`` at once; 0: nothing is trained."""
    if jobs == 0:
        yield from arms
    elif jobs > 1:
        yield from side_by_side(bench, with_targets(bench, arms, report), jobs, report)
    else:
        for arm in with_targets(bench, arms, report):
            train(bench, arm, report)
            yield arm


def with_targets(bench: Bench, arms: Sequence[Arm], report: Report) -> Iterator[Arm]:
    """The arms whose target sets exist or could be made."""
    for arm in arms:
        try:
            bench.targets(arm.targets, report)
        except LockedError:
            report.log(f"{arm.name}: another process is making the set {arm.targets!r}")
            continue
        yield arm


def side_by_side(bench: Bench, arms: Iterator[Arm], jobs: int, report: Report) -> Iterator[Arm]:
    """Train the arms in up to ``jobs`` processes; yields each when its process has ended. If the iterator is closed
    early, all of them write a checkpoint."""
    running: dict[Any, tuple[Arm, Any]] = {}
    ended: list[tuple[Arm, Any]] = []
    try:
        while True:
            for arm in itertools.islice(arms, jobs - len(running)):
                process = multiprocessing.get_context("spawn").Process(target=train_alone, args=(bench, arm))
                process.start()
                running[process.sentinel] = arm, process
            # Others are being trained while a finished one is scored.
            for arm, process in ended:
                process.join()
                if process.exitcode:
                    report.log(f"{arm.name}: training failed, with exit code {process.exitcode}")
                yield arm
            if not running:
                return
            ended = [running.pop(sentinel) for sentinel in wait(list(running))]
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def train_alone(bench: Bench, arm: Arm) -> None:
    """Train an arm in a separate process."""
    # Not reached by Ctrl-C: a second signal would not wait for the checkpoint.
    os.setpgrp()
    torch.set_num_threads(1)
    with progress(arm.name) as report:
        try:
            train(bench, arm, report)
        except Terminated:
            report.log("stopped")


def train(bench: Bench, arm: Arm, report: Report) -> None:
    """Train an arm, or resume it. Raises MismatchError if its folder was made with other settings."""
    try:
        pretrain(bench.work / arm.targets, bench.run(arm), bench.training(arm), report=report)
    except LockedError:
        report.log(f"{arm.name}: another process is training it")
