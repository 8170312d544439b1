"""Ten teachers of ten families from images to an exported student, by CLI.

Every teacher has random weights, read from a file. Eight images are extracted, the target set is checked against the
teacher (`verify --live`), a tiny student is trained for an epoch and exported. A call resumes where the last one ended.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.harness import at_least, finish, real_folder
from benchmarks.teacher_values import perturbed, save, visual_tower
from cae2pipe.artifacts.artifact import TargetsArtifact

IMAGES = 8


class Tour(NamedTuple):
    """A teacher: ``more`` are settings of it besides its weights, ``student`` the side and patch of its student."""

    family: str
    kind: str
    name: str
    more: Mapping[str, Any] = {}
    student: tuple[int, int] = (224, 32)


TOURS = (
    Tour("ViT", "timm", "vit_tiny_patch16_224", student=(224, 16)),
    Tour("FlexiViT", "timm", "flexivit_small", {"image_size": 224, "grid": [7, 7]}),
    Tour("DINOv3", "timm", "vit_small_patch16_dinov3", {"image_size": 224}, (224, 16)),
    Tour("EVA02", "timm", "eva02_tiny_patch14_224", student=(224, 14)),
    Tour("PE", "open_clip", "PE-Core-T-16-384", {"image_size": 224, "grid": [7, 7]}),
    Tour("CLIP ResNet", "open_clip", "RN50"),
    Tour("MobileCLIP2", "open_clip", "MobileCLIP2-S0", {"image_size": 256}, (256, 32)),
    Tour("ConvNeXt", "timm", "convnext_atto", {"stage": 3}),
    Tour("Swin", "timm", "swin_tiny_patch4_window7_224", {"stage": 3}),
    Tour("RepViT", "timm", "repvit_m1", {"stage": 3}),
)


def run(folder: Path, options: Any) -> None:
    """Every teacher that the folder's file of rows lacks; then the table, and with ``--out`` the result."""
    images, known = folder / "images", folder / "rows.json"
    if not images.exists():
        lay_images(images)
    rows = json.loads(known.read_text()) if known.exists() else []
    done = {row["teacher"] for row in rows}
    for tour in TOURS:
        if tour.name not in done:
            rows.append(travel(tour, images, folder / tour.name, in_process))
            known.write_text(json.dumps(rows))
            shutil.rmtree(folder / tour.name)
    ended = [at_least("teachers that come to an exported student", sum(row["ended"] for row in rows), len(TOURS), 0)]
    finish(options, "teacher_tour", rows, ended, {"images": IMAGES}, ("torch", "timm", "open_clip_torch"))


def travel(tour: Tour, images: Path, folder: Path, command: Callable[[Sequence[str]], int]) -> dict[str, Any]:
    """The row of a teacher: what it gave and the exit code of each command. Nothing follows one that failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if tour.kind == "timm":
        import timm

        state = perturbed(timm.create_model(tour.name)).state_dict()
    else:
        state = {f"visual.{name}": value for name, value in perturbed(visual_tower(tour.name)).state_dict().items()}
    weights = save(state, folder)
    targets, student, exported = (str(folder / name) for name in ("targets", "student", "exported"))
    side, patch = tour.student
    teacher = {"kind": tour.kind, "name": tour.name, "weights": str(weights), **tour.more}
    config = folder / "teacher.yaml"
    config.write_text(json.dumps({"teacher": teacher, "view": {"size": side}}))
    sets = [f"model.image_size={side}", f"model.patch_size={patch}", "optimizer.warmup_epochs=0"]
    sets += ["data.batch=8", "data.streams=1", "speed.workers=0"]
    given = [part for setting in sets for part in ("--set", setting)]
    steps: dict[str, Sequence[str]] = {
        "extract": f"extract-targets {images} {targets} --config {config} --views 1 --workers 0 --codec int8".split(),
        "verify": f"verify {targets} --live 8 --teacher-weights {weights}".split(),
        "pretrain": [*f"pretrain {targets} {student} --config demo --epochs 1".split(), *given],
        "export": ["export", student, exported],
    }
    row: dict[str, Any] = {"family": tour.family, "library": tour.kind, "teacher": tour.name, "ended": False}
    for name, arguments in steps.items():
        row[name] = command(arguments)
        if row[name]:
            return row
        if name == "extract":
            row["latents"] = stored_latents(Path(targets))
    return row | {"ended": True}


def stored_latents(targets: Path) -> str:
    """Grid and width in a line."""
    teacher = TargetsArtifact.open(targets).identity["teacher"]
    text = f"{teacher['rows']} x {teacher['cols']} x {teacher['dim']}"
    text += ", class token" if teacher["class_token"] else ""
    return text + (f", summary {teacher['summary']}" if teacher.get("summary") else "")


def in_process(arguments: Sequence[str]) -> int:
    """The exit code of a command, in this process, since torch and both libraries take long to import."""
    from cae2pipe.commands.app import app

    sys.stderr.write(f"cae2pipe {' '.join(arguments)}\n")
    try:
        app(list(arguments))
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def lay_images(folder: Path) -> None:
    """Eight photographs of imagenette if CAE2PIPE_REAL has them, else smooth noise."""
    folder.mkdir(parents=True)
    real = real_folder()
    if real:
        found = sorted((real / "imagenette" / "val").glob("*/*.JPEG"))
        for path in found[:: max(1, len(found) // IMAGES)][:IMAGES]:
            shutil.copy(path, folder)
        return
    noise = np.random.default_rng(0).integers(256, size=(IMAGES, 8, 8, 3), dtype=np.uint8)
    for number, values in enumerate(noise):
        Image.fromarray(values).resize((320, 320)).save(folder / f"{number}.jpg")
