"""The demo: every stage once, on images from pip packages, each with the command a user would run.

Read from top to bottom. Every stage skips finished work, so an interrupted demo resumes.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cae2pipe.artifacts.atomic import write_bytes, write_json
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import KnnSettings
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.demo.report import DemoCommand, DemoContents, demo_page, picture
from cae2pipe.demo.student import MeanStudent, mean_over_views, previews_of
from cae2pipe.demo.tiles import cut_tiles
from cae2pipe.reporting.pictures import png_bytes
from cae2pipe.reporting.stored_images import MOST
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.progress import Report, progress
from cae2pipe.shards.keys import sample_key
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.stored_image import StoredImage, find_image, read_stored_image
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.metrics import METRICS_FILE, read_lines
from cae2pipe.training.student import load_student

SEED = 0
VIEWS = 4
STORED = ("astronaut/00", "coffee/00")
"""Number of training tiles whose stored views the page shows."""
PREDICTED = ("motorcycle_left/05", "ihc/00", "coins/03", "astronaut/06", "retina/03", "camera/02")
"""Number of test tiles whose predictions the page shows."""

Reports = Callable[[str], AbstractContextManager[Report]]


def run_demo(
    out: Path,
    teacher: str = "lite0",
    device: str = "auto",
    *,
    say: Callable[[str], None] = print,
    reports: Reports = progress,
) -> dict[str, float]:
    """Run the whole pipeline into ``out``; write ``result.json``, ``report.html`` and ``picture.png``.

    Args:
        out: the output folder, created, or resumed if it exists.
        teacher: a preset of extract-targets.
        device: device of teacher and student.
        say: prints a line.
        reports: makes the progress report of a stage.

    Returns:
        The content of ``result.json``.

    Raises:
        SourceError: a package of photographs is missing. Also all errors of the stages.
    """
    began = time.monotonic()
    resumed = out.exists() and any(out.iterdir())
    images, targets, held_out, run = out / "images", out / "targets", out / "targets-val", out / "run"
    commands: list[DemoCommand] = []

    def announce(text: str, *command: object, own: str | None = None) -> None:
        line = shlex.join(str(part) for part in ("cae2pipe", *command))
        commands.append(DemoCommand(text, line, own))
        say(f"\n{text}\n$ {line}")

    given = [] if device == "auto" else ["--device", device]

    say(f"Images: tiles of 16 photographs from scikit-image and scikit-learn, written to {images}")
    with reports("tiles") as report:
        cut_tiles(images, SEED, report)

    announce(
        "Stage 1: cut augmented views of every image and store the teacher's latents of each view.",
        "extract-targets", images / "train", targets, "--config", teacher, "--views", VIEWS, *given,
        own="cae2pipe extract-targets imagenet/train targets --config clip-b16",
    )  # fmt: skip
    extract_to(images / "train", targets, teacher, views=VIEWS, device=device, reports=reports)

    student = student_options(TargetSet(targets))
    announce(
        "Stage 2: train a student from the store. The teacher is no longer needed.",
        "pretrain", targets, run, "--config", "demo", *student, *given,
        own="cae2pipe pretrain targets runs/base --config base",
    )  # fmt: skip
    settings = load(PretrainSettings, "pretrain", "demo", overrides=student[1:], values={"speed": {"device": device}})
    with reports("pretrain") as report:
        pretrain(targets, run, settings, report=report)

    announce(
        "Targets of the test tiles, to check the student's predictions on unseen images.",
        "extract-targets", images / "val", held_out, "--config", teacher, "--views", 1, *given,
    )  # fmt: skip
    extract_to(images / "val", held_out, teacher, views=1, device=device, reports=reports)

    knn = {}
    encoders = {"random": f"random:{run}", "pretrained": str(run), "teacher": f"teacher:{teacher}"}
    for name, encoder in encoders.items():
        announce(
            {
                "random": "Score the student before training: nearest neighbours among the training tiles.",
                "pretrained": "Score the trained student.",
                "teacher": "Score the teacher.",
            }[name],
            "evaluate", "knn", encoder, images, out / "scores" / name, *given,
            own="cae2pipe evaluate knn runs/base imagenet scores/base" if name == "pretrained" else None,
        )  # fmt: skip
        with reports(f"knn, {name}") as report:
            scores = evaluate(
                "knn", encoder, images, out=out / "scores" / name, settings=knn_settings(device), report=report
            )
        knn[name] = float(scores["top1"])

    say("\nResults: figures, report and picture")
    chosen = pick_device(device)
    stored, test = TargetSet(targets), TargetSet(held_out)
    with reports("report") as report:
        model, run_with = load_student(run, stored, report)
        lines = read_lines(run / METRICS_FILE)
        result = {
            **stored_figures(stored),
            **loss_figures(lines),
            "loss_mean_token": mean_over_views(MeanStudent(stored.mean), stored, run_with, device=chosen)["loss"],
            "centred_cosine_masked": mean_over_views(model, test, run_with, device=chosen)["centred_cosine_masked"],
            **{f"knn_{name}": value for name, value in knn.items()},
        }
        result = {name: round(value, 6) for name, value in result.items()}
        result = write_result(out / "result.json", result, None if resumed else time.monotonic() - began)
        per_epoch = max(1, sum(line["epoch"] == 0 for line in lines))
        contents = DemoContents(
            teacher=stored.teacher.name,
            codec=stored.layout.codec.name,
            grid=(stored.teacher.rows, stored.teacher.cols),
            result=result,
            losses=[(line["step"] / per_epoch, line["loss"]) for line in lines],
            bytes_per_view=codec_bytes(stored),
            stored=[stored_tile(stored, images / "train", name) for name in STORED],
            previews=previews_of(model, test, run_with, keys=[sample_key(name) for name in PREDICTED], device=chosen),
            commands=commands,
        )
        write_bytes(out / "report.html", demo_page(contents).encode("utf-8"))
        write_bytes(out / "picture.png", png_bytes(picture(contents)))
    return result


def extract_to(source: Path, out: Path, teacher: str, *, views: int, device: str, reports: Reports) -> None:
    settings = load(
        ExtractSettings, "extract", teacher, overrides=(), values={"views": views, "speed": {"device": device}}
    )
    with reports("extract-targets") as report:
        extract_targets(source, out, settings, report=report)


def student_options(targets: TargetSet) -> list[str]:
    """Options for a teacher whose grid is not the student's 14 x 14: another patch size."""
    patch = targets.view_size // targets.teacher.rows
    usual = load(PretrainSettings, "pretrain", "demo").model.patch_size
    return [] if patch == usual else ["--set", f"model.patch_size={patch}"]


def knn_settings(device: str) -> KnnSettings:
    return load(KnnSettings, "evaluate", "knn", overrides=(), values={"speed": {"device": device}})


def stored_figures(targets: TargetSet) -> dict[str, float]:
    """Size and fidelity of the store."""
    sizes, fidelity = targets.bytes_per_view(), targets.fidelity()
    return {
        "images": targets.images,
        "views": targets.views,
        "bytes_per_view_fp16": sizes["fp16"],
        "bytes_per_view": sizes["latents"],
        "fidelity_mean": fidelity["mean"],
        "fidelity_p1": fidelity["p1"],
    }


def loss_figures(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The loss of the first step, and the mean over the last epoch."""
    last = [line["loss"] for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return {"loss_first": lines[0]["loss"], "loss_last": sum(last) / len(last)}


def codec_bytes(targets: TargetSet) -> dict[str, float]:
    """Bytes per view: as stored, and with the two simpler codecs, whose sizes follow from the shape."""
    sizes = targets.bytes_per_view()
    teacher = targets.teacher
    # One byte per component, one fp16 scale and one fp16 norm per token.
    int8 = float(teacher.tokens * (teacher.dim + 4))
    return {"fp16": sizes["fp16"], "int8": int8, "stored": sizes["latents"], "pixels": sizes["pixels"]}


def stored_tile(targets: TargetSet, images: Path, name: str) -> StoredImage:
    """What the set holds of a tile, with the tile itself."""
    stored = read_stored_image(targets, *find_image(targets, sample_key(name)), range(MOST))
    with Image.open(images / f"{name}.jpg") as file:
        return replace(stored, picture=np.asarray(file.convert("RGB")))


def write_result(path: Path, result: Mapping[str, float], seconds: float | None) -> dict[str, float]:
    """Write ``result.json``, unless it has the same figures: then its ``seconds`` are those of the actual work.

    ``seconds``: None if an earlier command did a part of the work.
    """
    if path.exists():
        old: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        if {**old, "seconds": 0} == {**result, "seconds": 0}:
            return old
    new = dict(result) if seconds is None else {**result, "seconds": round(seconds, 1)}
    write_json(path, new)
    return new
