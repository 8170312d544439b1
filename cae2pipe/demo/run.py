"""The demo: every stage once, on images that pip brings, each by the command a user would run.

Read from top to bottom. Every stage skips what it finds done, so the demo goes on where it was interrupted.
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
from cae2pipe.demo.report import Contents, Step, picture, render
from cae2pipe.demo.student import MeanStudent, forecasts_of, mean_over_views
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
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.student import load_student

SEED = 0
VIEWS = 4
STORED = ("astronaut/00", "coffee/00")
"""Training tiles whose stored views the page shows."""
FORECAST = ("motorcycle_left/05", "ihc/00", "coins/03", "astronaut/06", "retina/03", "camera/02")
"""Test tiles whose predictions the page shows."""

Reports = Callable[[str], AbstractContextManager[Report]]


def run_demo(
    out: Path,
    teacher: str = "lite0",
    device: str = "auto",
    say: Callable[[str], None] = print,
    reports: Reports = progress,
) -> dict[str, float]:
    """Run the whole pipeline into ``out``; write ``result.json``, ``report.html`` and ``picture.png``.

    Args:
        out: the folder to make, or to go on with.
        teacher: a preset of extract-targets.
        device: of teacher and student.
        say: prints a line.
        reports: gives a stage its progress report.

    Returns:
        What ``result.json`` holds.

    Raises:
        SourceError: a package of photographs is missing. Everything the stages raise.
    """
    began = time.monotonic()
    images, targets, held_out, run = out / "images", out / "targets", out / "targets-val", out / "run"
    steps: list[Step] = []

    def announce(text: str, *command: object, own: str | None = None) -> None:
        line = shlex.join(str(part) for part in ("cae2pipe", *command))
        steps.append(Step(text, line, own))
        say(f"\n{text}\n$ {line}")

    given = [] if device == "auto" else ["--device", device]

    say(f"The images: tiles of 16 photographs that scikit-image and scikit-learn ship, into {images}")
    with reports("tiles") as report:
        cut_tiles(images, SEED, report)

    announce(
        "Stage 1: cut augmented views of every image and store the teacher's latents of each.",
        "extract-targets", images / "train", targets, "--config", teacher, "--views", VIEWS, *given,
        own="cae2pipe extract-targets imagenet/train targets --config clip-b16",
    )  # fmt: skip
    extract_to(images / "train", targets, teacher, VIEWS, device, reports)

    student = student_options(TargetSet(targets))
    announce(
        "Stage 2: train a student from the store. The teacher is not needed any more.",
        "pretrain", targets, run, "--config", "demo", *student, *given,
        own="cae2pipe pretrain targets runs/base --config base",
    )  # fmt: skip
    settings = load(PretrainSettings, "pretrain", "demo", student[1:], {"speed": {"device": device}})
    with reports("pretrain") as report:
        pretrain(targets, run, settings, report)

    announce(
        "Targets of the test tiles, to see what the student predicts on images it never saw.",
        "extract-targets", images / "val", held_out, "--config", teacher, "--views", 1, *given,
    )  # fmt: skip
    extract_to(images / "val", held_out, teacher, 1, device, reports)

    knn = {}
    encoders = {"random": f"random:{run}", "pretrained": str(run), "teacher": f"teacher:{teacher}"}
    for name, encoder in encoders.items():
        announce(
            {
                "random": "Score the student as it was before training: nearest neighbours among the training tiles.",
                "pretrained": "Score the trained student.",
                "teacher": "Score the teacher.",
            }[name],
            "evaluate", "knn", encoder, images, out / "scores" / name, *given,
            own="cae2pipe evaluate knn runs/base imagenet scores/base" if name == "pretrained" else None,
        )  # fmt: skip
        with reports(f"knn, {name}") as report:
            scores = evaluate("knn", encoder, images, out / "scores" / name, knn_settings(device), report)
        knn[name] = float(scores["top1"])

    say("\nWhat came out: figures, report and picture")
    chosen = pick_device(device)
    stored, test = TargetSet(targets), TargetSet(held_out)
    with reports("report") as report:
        model, run_with = load_student(run, stored, report)
        lines = read_lines(run / "metrics.jsonl")
        result = {
            **stored_figures(stored),
            **loss_figures(lines),
            "loss_mean_token": mean_over_views(MeanStudent(stored.mean), stored, run_with, chosen)["loss"],
            "centred_cosine_masked": mean_over_views(model, test, run_with, chosen)["centred_cosine_masked"],
            **{f"knn_{name}": value for name, value in knn.items()},
        }
        result = {name: round(value, 6) for name, value in result.items()}
        result = write_result(out / "result.json", result, time.monotonic() - began)
        per_epoch = max(1, sum(line["epoch"] == 0 for line in lines))
        contents = Contents(
            teacher=stored.teacher.name,
            codec=stored.layout.codec.name,
            grid=(stored.teacher.rows, stored.teacher.cols),
            result=result,
            losses=[(line["step"] / per_epoch, line["loss"]) for line in lines],
            bytes_per_view=codec_bytes(stored),
            stored=[stored_tile(stored, images / "train", name) for name in STORED],
            forecasts=forecasts_of(model, test, run_with, [sample_key(name) for name in FORECAST], chosen),
            steps=steps,
        )
        write_bytes(out / "report.html", render(contents).encode("utf-8"))
        write_bytes(out / "picture.png", png_bytes(picture(contents)))
    return result


def extract_to(source: Path, out: Path, teacher: str, views: int, device: str, reports: Reports) -> None:
    settings = load(ExtractSettings, "extract", teacher, (), {"views": views, "speed": {"device": device}})
    with reports("extract-targets") as report:
        extract_targets(source, out, settings, report)


def student_options(targets: TargetSet) -> list[str]:
    """What the demo's student needs to be told where the teacher's grid is not its own 14 x 14: another patch size."""
    patch = targets.view_size // targets.teacher.rows
    usual = load(PretrainSettings, "pretrain", "demo").model.patch_size
    return [] if patch == usual else ["--set", f"model.patch_size={patch}"]


def knn_settings(device: str) -> KnnSettings:
    return load(KnnSettings, "evaluate", "knn", (), {"speed": {"device": device}})


def stored_figures(targets: TargetSet) -> dict[str, float]:
    """What the store holds and how true it is."""
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
    """The first step's loss, and the mean over the last epoch's steps."""
    last = [line["loss"] for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return {"loss_first": lines[0]["loss"], "loss_last": sum(last) / len(last)}


def codec_bytes(targets: TargetSet) -> dict[str, float]:
    """Bytes a view: as stored, and as the two simpler codecs would take (their sizes follow from the shape)."""
    sizes = targets.bytes_per_view()
    teacher = targets.teacher
    # One byte a component, an fp16 scale and an fp16 norm a token.
    int8 = float(teacher.tokens * (teacher.dim + 4))
    return {"fp16": sizes["fp16"], "int8": int8, "stored": sizes["latents"], "pixels": sizes["pixels"]}


def stored_tile(targets: TargetSet, images: Path, name: str) -> StoredImage:
    """What the set holds of a tile, with the tile itself."""
    stored = read_stored_image(targets, *find_image(targets, sample_key(name)), range(MOST))
    with Image.open(images / f"{name}.jpg") as file:
        return replace(stored, picture=np.asarray(file.convert("RGB")))


def write_result(path: Path, result: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Write ``result.json``, unless it holds these figures already: then its ``seconds`` are those of the work."""
    if path.exists():
        old: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        if {**old, "seconds": 0} == {**result, "seconds": 0}:
            return old
    new = {**result, "seconds": round(seconds, 1)}
    write_json(path, new)
    return new
