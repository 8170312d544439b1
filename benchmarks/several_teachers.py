"""Does a student learn more from two teachers than from one of them?

The teachers are ViT-Ti and EfficientNet-Lite0, both at 224 pixels with their 14 x 14 latents averaged to the student's
7 x 7, over the same stored views of 112 pixels: the second set is made from the stored views of the first. Arms:

- vit-ti, lite0: one teacher.
- both: both, with equal weights.

All arms have the same views, steps and seeds. 3,000 training images of imagenette; scores on its 800 val images, of the
teachers and of the students: of the mean of the patches, and of the class token where it has a loss (Lite0 has none).

It can be interrupted: everything is made in WORK, existing results are reused, interrupted runs resume, and the result
is written after every run.

    python -m benchmarks.several_teachers --work FOLDER [--epochs 40] [--seeds 3]
        [--out benchmarks/results/several_teachers-cpu.json]
"""

from __future__ import annotations

import signal
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parse_options, write_result
from benchmarks.sample import teacher_of
from benchmarks.teacher_grid import FIDELITY, remembered
from benchmarks.view_arms import Arm, Bench, fill_in, interruptible, make_bench
from benchmarks.view_scores import CPU, Labels, bytes_per_view, standard_error
from benchmarks.views import leave
from cae2pipe.artifacts.artifact import RunArtifact, TargetsArtifact
from cae2pipe.config.base import load
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.evaluation.encoders import FrozenEncoder, FrozenTeacher, load_encoder
from cae2pipe.runtime.progress import Report
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.target_set import TargetSet

ARMS = {"vit-ti": ("vit-ti",), "lite0": ("lite0",), "both": ("vit-ti", "lite0")}
"""The target sets that each arm's students learn from."""


def main() -> None:
    options = parse_options(
        __doc__,
        work={"type": Path, "required": True, "help": "folder in which sets, runs and scores are made or reused"},
        epochs={"type": int, "help": "epochs per run; default 40"},
        seeds={"type": int, "help": "runs per arm; default 3"},
        views={"type": int, "help": "stored views of each image; default 4"},
    )
    fill_in(options, epochs=(40, 2), seeds=(3, 1), views=(4, 1))
    bench = make_bench(options, options.epochs)
    rows = interruptible("several_teachers", lambda report: measure(bench, options, report))
    finish(options, "several_teachers", rows, [], about(bench, rows), ("torch", "timm"))


def measure(bench: Bench, options: Namespace, report: Report) -> list[dict[str, Any]]:
    """Train and score all runs, seed by seed; the result is written after each. Returns the rows."""
    make_sets(bench, report)
    scorer = Labels(bench.data, bench.size)
    teachers = {}
    for name in ("vit-ti", "lite0"):
        teachers[name] = teacher_scores(bench, name)
        report.log(f"teacher, {name}: {teachers[name]}")
    students: dict[str, list[dict[str, float]]] = {}
    rows = []
    for seed in range(options.seeds):
        for name in ARMS:
            students.setdefault(name, []).append(student_scores(bench, train(bench, name, seed, report), scorer))
            report.log(f"{name}, seed {seed}: {students[name][-1]}")
            rows = [arm_row(bench, arm, teachers.get(arm), scores) for arm, scores in students.items()]
            if options.out:
                write_result(options, "several_teachers", rows, [], about(bench, rows), ("torch", "timm"))
    return rows


def make_sets(bench: Bench, report: Report) -> None:
    """Both teachers' target sets: ViT-Ti's from the images, Lite0's from the views that the first stores."""
    grid = bench.training(Arm("", "", bench.stored, FIDELITY, 0)).model.grid
    extract_targets(bench.data / "train", bench.work / "vit-ti", vit_ti(bench, grid), report=report)
    extract_targets(bench.work / "vit-ti", bench.work / "lite0", lite0(bench, grid), report=report)


def vit_ti(bench: Bench, grid: int) -> ExtractSettings:
    """Stage 1 of the first teacher."""
    chosen = bench.stage_1(bench.stored, {"name": "klt", "fidelity": FIDELITY})
    teacher = {"image_size": 2 * bench.size, "grid": (grid, grid)}
    return chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update=teacher)})


def lite0(bench: Bench, grid: int) -> ExtractSettings:
    """Stage 1 of the second."""
    values = {
        "teacher": {"image_size": 2 * bench.size, "grid": [grid, grid]},
        "codec": {"name": "klt", "fidelity": FIDELITY},
        "speed": {"device": bench.device, "workers": 0 if bench.quick else -1},
    }
    return load(ExtractSettings, "extract", "lite0", overrides=(), values=values)


def train(bench: Bench, name: str, seed: int, report: Report) -> Path:
    """Train a student of an arm, or resume it. Returns its run."""
    arm = Arm(f"{name}-s{seed}", name, bench.stored, FIDELITY, seed)
    pretrain([bench.work / each for each in ARMS[name]], bench.run(arm), bench.training(arm), report=report)
    return bench.run(arm)


def teacher_scores(bench: Bench, name: str) -> dict[str, float]:
    """Accuracies of a teacher at its own input size."""
    make = vit_ti if name == "vit-ti" else lite0
    grid = bench.training(Arm("", "", bench.stored, FIDELITY, 0)).model.grid

    def measured() -> dict[str, Any]:
        return accuracies(Labels(bench.data, 2 * bench.size), FrozenTeacher(teacher_of(make(bench, grid))))

    return remembered(bench, f"teacher-{name}", TargetsArtifact.open(bench.work / name).fingerprint, measured)


def student_scores(bench: Bench, run: Path, scorer: Labels) -> dict[str, float]:
    """Accuracies of a trained student."""

    def measured() -> dict[str, Any]:
        return accuracies(scorer, load_encoder(str(run), 0, CPU))

    return remembered(bench, run.name, RunArtifact.open(run).fingerprint, measured)


def accuracies(scorer: Labels, encoder: FrozenEncoder) -> dict[str, Any]:
    """``mean_knn``, ``mean_linear`` and, where the class token is trained, ``class_knn`` and ``class_linear``."""
    features = ["mean", *(["class"] if encoder.trained_class_token else [])]
    found = {feature: scorer.accuracies(encoder, True, feature) for feature in features}
    return {f"{feature}_{score}": value for feature, scores in found.items() for score, value in scores.items()}


def arm_row(
    bench: Bench, name: str, teacher: Mapping[str, float] | None, students: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """An arm's row: scores of teacher and students in per cent, the latter by seed and with their mean."""
    row: dict[str, Any] = {"arm": name}
    sizes = [bytes_per_view(TargetSet(bench.work / each), bench.stored)["latents"] for each in ARMS[name]]
    row["kb_latents_per_view"] = round(sum(sizes) / 1000, 2)
    for score in students[0]:
        values = [student[score] for student in students]
        row |= {
            f"teacher_{score}": round(teacher[score], 2) if teacher else None,
            score: [round(value, 2) for value in values],
            f"{score}_mean": round(statistics.mean(values), 2),
            f"{score}_spread": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        }
    return row


def about(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of the result. ``standard_error``: of an accuracy, by the number of test images, in points."""
    errors = [standard_error(row["mean_linear_mean"], bench.test_images) for row in rows]
    return {
        "epochs": bench.epochs,
        "views": bench.stored,
        "size": bench.size,
        "fidelity": FIDELITY,
        "test_images": bench.test_images,
        "standard_error": round(statistics.mean(errors), 2) if errors else None,
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    main()
