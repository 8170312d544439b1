"""How many stored views does a long run need, and how exact must they be?

Claims: after 200 epochs, 32 views stand within two standard errors of a fresh crop in every epoch, and one view stands
more than two below 8; at 32 views a fidelity of 0.97 stands within two standard errors of 0.999. All arms take equal
steps; "fresh" has as many stored views as epochs, so that no crop is ever seen twice. 3,000 training images of
imagenette, ViT-Ti teacher at 112 pixels; scores on its 800 val images.

Takes hours, so it works in pieces: everything is made in WORK, what is there is adopted, what was cut off resumes, and
the result is written after every arm. A run that another process is training is scored as far as it is.

    python -m benchmarks.views --work FOLDER [--arms v1-s0,v32-k97-s0,fresh-s0] [--jobs 2] [--only-score]
        [--picture docs/views.png] [--out benchmarks/results/views-cpu.json]
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import at_least, at_most, finish, parse_options, real_folder, write_result
from benchmarks.sample import settings as stage_1
from benchmarks.sample import write_noise
from benchmarks.view_scores import Scorer, bytes_per_view, kept_epochs, training_losses
from cae2pipe.artifacts.atomic import write_json
from cae2pipe.artifacts.box import Box, is_box, open_same
from cae2pipe.config.base import identity, load
from cae2pipe.config.extract import CodecSettings, ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import LockedError, Terminated
from cae2pipe.loading.order import steps_per_epoch
from cae2pipe.progress import Report, progress
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.device import pick_device, resolve_precision, set_backends

ARMS = "v1-s0,v8-s0,v32-s0,fresh-s0,v2-s0,v4-s0,v16-s0,v1-s1,v8-s1,v32-s1,fresh-s1,v32-k99-s0,v32-k97-s0,v32-k90-s0"
QUICK_ARMS = "v1-s0,v2-s0,v2-k90-s0,fresh-s0"
NAME = re.compile(r"(?:v(?P<views>\d+)(?:-k(?P<digits>\d+))?|fresh)-s(?P<seed>\d+)")
HELD_OUT_VIEWS = 4


@dataclass(frozen=True)
class Arm:
    """One run: ``targets`` is the name of the set it is trained on, ``views`` how many of that set's views."""

    name: str
    targets: str
    views: int
    fidelity: float
    seed: int


@dataclass(frozen=True)
class Bench:
    """What all arms share. ``data`` holds train and val; ``size`` is a view's side in pixels."""

    work: Path
    data: Path
    size: int
    epochs: int
    keep: int
    stored: int
    device: str
    quick: bool

    def run(self, arm: Arm) -> Path:
        return self.work / "runs" / arm.name

    def stage_1(self, views: int, codec: dict[str, Any]) -> ExtractSettings:
        speed = {"device": self.device, "workers": 0 if self.quick else -1}
        chosen = stage_1(self.device, self.work, views=views, codec=codec, view={"size": self.size}, speed=speed)
        return chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update={"image_size": self.size})})

    def training(self, arm: Arm) -> PretrainSettings:
        """The student of an arm: equal steps for all, and a checkpoint kept every ``keep`` epochs."""
        values = {
            "epochs": self.epochs,
            "seed": arm.seed,
            "model": {
                "width": 96,
                "depth": 4,
                "heads": 3,
                "image_size": self.size,
                "regressor_depth": 1,
                "regressor_width": 96,
                "regressor_heads": 3,
                "layer_scale": 1.0,
                "regressor_layer_scale": 1.0,
                "drop_path": 0,
            },
            "mask": {"ratio": 0.25},
            "data": {"batch": 64, "streams": 8, "views": arm.views},
            "optimizer": {"lr": 2e-3, "scale_lr": False, "warmup_epochs": min(5, self.epochs / 2)},
            "speed": {"device": self.device, "workers": 0, "keep_epochs": self.keep},
        }
        return load(PretrainSettings, "pretrain", "small", (), values)

    def targets(self, name: str, report: Report) -> Path:
        """A target set by name, made where it is missing: ``v32`` holds fp16 latents of 32 views, ``k999`` the same
        recoded, ``fresh`` a view for every epoch, ``held`` the val images."""
        root = self.work / name
        train = self.data / "train"
        if is_box(root, "targets") and TargetSet(root).box.complete:
            return root
        if name == "held":
            extract_targets(self.data / "val", root, self.stage_1(HELD_OUT_VIEWS, {"name": "fp16"}), report)
        elif name == "fresh":
            extract_targets(train, root, self.stage_1(self.epochs, {"name": "klt", "fidelity": 0.999}), report)
        elif name == f"v{self.stored}":
            extract_targets(train, root, self.stage_1(self.stored, {"name": "fp16"}), report)
        else:
            source = self.targets(f"v{self.stored}", report)
            recode(source, root, CodecSettings(fidelity=fidelity_of(name[1:])), report)
        return root


def main() -> None:
    options = parse_options(
        __doc__,
        work={"type": Path, "required": True, "help": "where sets, runs and scores are made or adopted"},
        arms={"help": f"arms to make and score; default {ARMS}"},
        epochs={"type": int, "help": "epochs of an arm, and views of the fresh set; default 200"},
        stored={"type": int, "help": "views of the set that all but fresh are trained on; default 32"},
        keep={"type": int, "help": "a score every so many epochs; default 20"},
        linear={"type": int, "help": "a linear score every so many epochs; default 100"},
        jobs={"type": int, "default": 1, "help": "arms trained at once, each in a process with one thread"},
        picture={"type": Path, "help": "draw accuracy over epochs and over kB here"},
        **{
            "only-score": {"action": "store_true", "help": "make no set of training images and train nothing"},
            "pixels-once": {"type": float, "help": "kB of an image stored once, to replay its views from"},
        },
    )
    for name, full, quick in (("epochs", 200, 3), ("stored", 32, 2), ("keep", 20, 1), ("linear", 100, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    torch.set_num_threads(1)
    set_backends()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        options.work.resolve(),
        quick_images(options.work.resolve()) if options.quick else all_images(),
        48 if options.quick else 112,
        options.epochs,
        options.keep,
        options.stored,
        options.device,
        options.quick,
    )
    arms = [parse_arm(name, bench) for name in (options.arms or (QUICK_ARMS if options.quick else ARMS)).split(",")]
    with progress("views") as report:
        try:
            rows = measure(bench, arms, options, report)
        except (KeyboardInterrupt, Terminated):
            sys.exit("stopped; the same command resumes")
    finish(options, "views", rows, *summary(rows, bench, options))


def all_images() -> Path:
    real = real_folder()
    return real / "imagenette" if real else sys.exit("without CAE2PIPE_REAL there is only --quick")


def quick_images(work: Path, train: int = 12, val: int = 5) -> Path:
    """The first images of each class, or noise where there are none, in ``work``."""
    real, root = real_folder(), work / "images"
    for part, count in (("train", train), ("val", val)):
        if (root / part).is_dir():
            continue
        if real is None:
            for number in range(8):
                # Noise is drawn by its size: each class has its own.
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
    found = NAME.fullmatch(name)
    if not found:
        sys.exit(f"{name!r} is not an arm: give v32-s0, v32-k97-s0 or fresh-s0 for 32 views, fidelity 0.97, seed 0")
    seed = int(found["seed"])
    if not found["views"]:
        return Arm(name, "fresh", bench.epochs, 0.999, seed)
    digits, views = found["digits"] or "999", int(found["views"])
    if not 1 <= views <= bench.stored:
        sys.exit(f"{name}: the set has {bench.stored} views; give --stored {views}")
    return Arm(name, f"k{digits}", views, fidelity_of(digits), seed)


def measure(bench: Bench, arms: Sequence[Arm], options: Namespace, report: Report) -> list[dict[str, Any]]:
    """Train and score the arms, one after the other; the result is written after each. Returns all rows."""
    scorer = None
    done: dict[str, list[dict[str, Any]]] = {}
    for arm in trained(bench, arms, options, report):
        if not is_box(bench.run(arm), "run"):
            report.log(f"{arm.name}: not trained yet")
            continue
        scorer = scorer or Scorer(bench.data, TargetSet(bench.targets("held", report)), bench.size)
        done[arm.name] = arm_rows(bench, arm, scorer, options, report)
        rows = [row for each in arms for row in done.get(each.name, [])]
        checks, settings, libraries = summary(rows, bench, options)
        if options.out:
            write_result(options, "views", rows, checks, settings, libraries)
        if options.picture and rows:
            draw(rows, settings["test_images"], options.picture)
    return [row for each in arms for row in done.get(each.name, [])]


def trained(bench: Bench, arms: Sequence[Arm], options: Namespace, report: Report) -> Iterator[Arm]:
    """The arms as they are trained, ``jobs`` at once; with --only-score as they are."""
    if options.only_score:
        yield from arms
        return
    if options.jobs == 1:
        for arm in arms:
            bench.targets(arm.targets, report)
            train(bench, arm, report)
            yield arm
        return
    for name in dict.fromkeys(arm.targets for arm in arms):
        bench.targets(name, report)
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        jobs = {pool.submit(train_alone, bench, arm): arm for arm in arms}
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]


def train_alone(bench: Bench, arm: Arm) -> None:
    """Train an arm in a process of its own."""
    torch.set_num_threads(1)
    with progress(arm.name) as report:
        train(bench, arm, report)


def train(bench: Bench, arm: Arm, report: Report) -> None:
    """Train an arm, or resume it. Raises MismatchError where its folder was made under other settings."""
    try:
        pretrain(bench.work / arm.targets, bench.run(arm), bench.training(arm), report)
    except LockedError:
        report.log(f"{arm.name}: another process is training it")


def arm_rows(bench: Bench, arm: Arm, scorer: Scorer, options: Namespace, report: Report) -> list[dict[str, Any]]:
    """An arm's row for every checkpoint that it has kept.

    Raises:
        MismatchError: the run was made under other settings, or from another target set.
    """
    targets = TargetSet(bench.work / arm.targets)
    settings = bench.training(arm)
    settings = settings.model_copy(update={"precision": resolve_precision("auto", pick_device(bench.device))})
    asked = {"settings": identity(settings), "targets": targets.box.fingerprint}
    run = open_same(bench.run(arm), "run", asked, fix="give the options that this run was made with")
    steps = steps_per_epoch(targets.images, settings.loaded_batch, settings.data.last_batch)
    epochs = kept_epochs(run.root, steps, bench.keep)
    scores = scored(bench, arm, run, settings, scorer, steps, epochs, options.linear, report)
    losses = training_losses(run.root)
    stored = bytes_per_view(targets, arm.views)
    rows = []
    for epoch in epochs:
        found = scores[str(epoch)]
        row = {"arm": arm.name, "views": arm.views, "fidelity": arm.fidelity, "seed": arm.seed, "epoch": epoch}
        row |= {name: None if found[name] is None else round(found[name], 2) for name in ("knn", "linear")}
        row |= {"train_loss": round(losses[epoch], 4), "held_out_loss": round(found["held_out_loss"], 4)}
        row["kb_per_image"] = round(arm.views * sum(stored.values()) / 1000, 1)
        if options.pixels_once is not None:
            row["kb_pixels_once"] = round(arm.views * stored["latents"] / 1000 + options.pixels_once, 1)
        rows.append(row)
    return rows


def scored(
    bench: Bench,
    arm: Arm,
    run: Box,
    settings: PretrainSettings,
    scorer: Scorer,
    steps: int,
    epochs: Sequence[int],
    linear: int,
    report: Report,
) -> dict[str, dict[str, Any]]:
    """Scores by epoch, which are kept in ``WORK/scores``; those that are missing are made."""
    path = bench.work / "scores" / f"{arm.name}.json"
    path.parent.mkdir(exist_ok=True)
    made_from = {"run": run.fingerprint, "held_out": scorer.held_out.box.fingerprint}
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("made_from") != made_from:
        kept = {"made_from": made_from, "epochs": {}}
    scores: dict[str, dict[str, Any]] = kept["epochs"]
    for epoch in epochs:
        wanted = epoch % linear == 0
        found = scores.get(str(epoch))
        if found and not (wanted and found["linear"] is None):
            continue
        scores[str(epoch)] = scorer.score(run, settings, epoch * steps, wanted)
        write_json(path, kept)
        report.log(f"{arm.name}, epoch {epoch}: {shown(scores[str(epoch)])}")
    return scores


def shown(scores: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)


def summary(
    rows: Sequence[dict[str, Any]], bench: Bench, options: Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any], tuple[str, ...]]:
    """Checks of the arms that are finished, settings and libraries, as ``finish`` takes them."""
    images = sum(1 for path in (bench.data / "val").rglob("*") if path.is_file())
    last = {row["arm"]: row for row in rows if row["epoch"] == bench.epochs}
    settings = {
        "epochs": bench.epochs,
        "size": bench.size,
        "test_images": images,
        "held_out_views": HELD_OUT_VIEWS,
        "pixels_once_kb": options.pixels_once,
        "standard_error": {
            name: round(sum(errors) / len(errors), 2)
            for name in ("knn", "linear")
            if (errors := [standard_error(row[name], images) for row in last.values() if row[name] is not None])
        },
    }
    return checks_of(last, images, bench.stored), settings, ("torch", "timm", "numcodecs")


def checks_of(last: dict[str, dict[str, Any]], images: int, most: int) -> list[dict[str, Any]]:
    """The claims on the last epoch of seed 0 whose two arms are there, in standard errors of the difference."""
    claims = [
        ("fresh-s0", "v8-s0", at_most),
        ("fresh-s0", f"v{most}-s0", at_most),
        ("v8-s0", "v1-s0", at_least),
        *((f"v{most}-s0", f"v{most}-k{digits}-s0", at_most) for digits in ("99", "97", "90")),
    ]
    checks = []
    for above, below, check in claims:
        for score in ("knn", "linear"):
            if above not in last or below not in last or last[below][score] is None or last[above][score] is None:
                continue
            one, other = last[above][score], last[below][score]
            error = math.hypot(standard_error(one, images), standard_error(other, images))
            name = f"{score}: {above} over {below}, {one - other:+.1f} points, in standard errors"
            checks.append(check(name, (one - other) / error if error else 0.0, 2.0, 2))
    return checks


def standard_error(score: float, images: int) -> float:
    """Of an accuracy in percent on so many test images, in points."""
    return math.sqrt(score * (100 - score) / images)


def draw(rows: Sequence[dict[str, Any]], images: int, path: Path) -> None:
    """kNN over epochs for every V at 0.999; and the last epoch's scores against bytes, fresh crops as a level."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    plain = [row for row in rows if row["fidelity"] == 0.999]
    counts = sorted({row["views"] for row in plain if not is_fresh(row)})
    shades = plt.get_cmap("viridis_r")
    for arm in dict.fromkeys(row["arm"] for row in sorted(plain, key=lambda row: (is_fresh(row), row["views"]))):
        own = [row for row in plain if row["arm"] == arm]
        fresh, first = is_fresh(own[0]), own[0]["seed"] == 0
        colour = "black" if fresh else shades(0.1 + 0.9 * counts.index(own[0]["views"]) / max(1, len(counts) - 1))
        label = ("fresh crops" if fresh else f"V = {own[0]['views']}") if first else None
        style = "-" if first else ":"
        left.plot(
            [row["epoch"] for row in own], [row["knn"] for row in own], style, color=colour, label=label, linewidth=1.4
        )
    left.set_xlabel("epoch")
    left.set_ylabel("kNN top-1, %")
    left.set_title("stored views at 0.999 (dotted: another seed)")
    if left.lines:
        left.legend(fontsize="small")
    end = max(row["epoch"] for row in rows)
    last = [row for row in rows if row["epoch"] == end and row["seed"] == 0]
    for score, marker, colour in (("knn", "o", "#0072b2"), ("linear", "s", "#d55e00")):
        known = [row for row in last if row[score] is not None]
        for row in known:
            error = standard_error(row[score], images)
            if is_fresh(row):
                right.axhline(row[score], color=colour, linestyle="--", linewidth=1, label=f"{score}, fresh crops")
                right.axhspan(row[score] - error, row[score] + error, color=colour, alpha=0.12, linewidth=0)
        stored = [row for row in known if not is_fresh(row)]
        for bytes_, filled in (("kb_per_image", True), ("kb_pixels_once", False)):
            some = [row for row in stored if bytes_ in row]
            if not some:
                continue
            right.errorbar(
                [row[bytes_] for row in some],
                [row[score] for row in some],
                yerr=[standard_error(row[score], images) for row in some] if filled else None,
                fmt=marker,
                color=colour,
                markerfacecolor=colour if filled else "none",
                label=score if filled else f"{score}, pixels once",
            )
        for row in stored if score == "knn" else ():
            name = row["arm"].removesuffix("-s0")
            right.annotate(name, (row["kb_per_image"], row[score]), xytext=(4, -10), textcoords="offset points", size=7)
    right.set_xscale("log")
    right.set_xlabel("kB an image on the disk, latents and pixels")
    right.set_ylabel("top-1, %")
    right.set_title(f"after {end} epochs (bars: one standard error, {images} images)")
    if right.has_data():
        right.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def is_fresh(row: dict[str, Any]) -> bool:
    return bool(row["arm"].startswith("fresh"))


if __name__ == "__main__":
    main()
