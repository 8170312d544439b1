"""Does a teacher that sees more pixels than the student, with its latents averaged to the student's grid, help?

Arms, each with a student of 112 pixels and patches of 16, a 7 x 7 grid:

- own: views of 112 pixels; the teacher sees them at 112, in its own 7 x 7 grid.
- enlarged: the same views, which the teacher sees enlarged to 224; its 14 x 14 latents averaged to 7 x 7.
- finer: views of 224 pixels, which the teacher sees and the student reads reduced; latents averaged to 7 x 7.

All arms have the same crops, steps and seeds. 3,000 training images of imagenette, ViT-Ti teacher; scores of the class
token on its 800 val images, of the teacher as the arm uses it and of the students.

It can be interrupted: everything is made in WORK, existing results are reused, interrupted runs resume, and the result
is written after every run.

    python -m benchmarks.teacher_grid --work FOLDER [--epochs 20] [--seeds 3]
        [--out benchmarks/results/teacher_grid-cpu.json]
"""

from __future__ import annotations

import json
import signal
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parse_options, write_result
from benchmarks.sample import teacher_of
from benchmarks.view_arms import Arm, Bench, fill_in, interruptible, make_bench, train
from benchmarks.view_scores import CPU, Labels, bytes_per_view, standard_error
from benchmarks.views import leave
from cae2pipe.artifacts.artifact import RunArtifact, TargetsArtifact
from cae2pipe.artifacts.atomic import write_json
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.evaluation.encoders import FrozenTeacher, load_encoder
from cae2pipe.runtime.progress import Report
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet

FIDELITY = 0.999


@dataclass(frozen=True)
class Kind:
    """How an arm's targets are made: sides of view and teacher's input as multiples of the student's, and whether
    latents are averaged to the student's grid."""

    view: int
    teacher: int
    averaged: bool


KINDS = {"own": Kind(1, 1, False), "enlarged": Kind(1, 2, True), "finer": Kind(2, 2, True)}


def main() -> None:
    options = parse_options(
        __doc__,
        work={"type": Path, "required": True, "help": "folder in which sets, runs and scores are made or reused"},
        epochs={"type": int, "help": "epochs per run; default 20"},
        seeds={"type": int, "help": "runs per arm; default 3"},
        views={"type": int, "help": "stored views of each image; default 4"},
    )
    fill_in(options, epochs=(20, 2), seeds=(3, 1), views=(4, 1))
    bench = make_bench(options, options.epochs)
    rows = interruptible("teacher_grid", lambda report: measure(bench, options, report))
    finish(options, "teacher_grid", rows, [], about(bench, rows), ("torch", "timm"))


def measure(bench: Bench, options: Namespace, report: Report) -> list[dict[str, Any]]:
    """Train and score all runs, seed by seed; the result is written after each. Returns the rows."""
    scores: dict[str, list[dict[str, float]]] = {}
    teachers = {}
    for kind in KINDS:
        extract_targets(bench.data / "train", bench.work / kind, extraction(bench, kind), report=report)
        teachers[kind] = teacher_scores(bench, kind)
        report.log(f"teacher, {kind}: {teachers[kind]}")
    scorer = Labels(bench.data, bench.size)
    rows = []
    for seed in range(options.seeds):
        for kind in KINDS:
            arm = Arm(f"{kind}-s{seed}", kind, options.views, FIDELITY, seed)
            train(bench, arm, report)
            scores.setdefault(kind, []).append(student_scores(bench, arm, scorer))
            report.log(f"{arm.name}: {scores[kind][-1]}")
            rows = [arm_row(bench, name, teachers[name], values) for name, values in scores.items()]
            if options.out:
                write_result(options, "teacher_grid", rows, [], about(bench, rows), ("torch", "timm"))
    return rows


def extraction(bench: Bench, name: str) -> ExtractSettings:
    """Stage 1 of an arm."""
    kind, chosen = KINDS[name], bench.stage_1(bench.stored, {"name": "klt", "fidelity": FIDELITY})
    student = bench.training(Arm("", name, bench.stored, FIDELITY, 0)).model
    grid = (student.grid, student.grid) if kind.averaged else None
    teacher = {"image_size": kind.teacher * bench.size, "grid": grid}
    return chosen.model_copy(
        update={
            "view": chosen.view.model_copy(update={"size": kind.view * bench.size}),
            "teacher": chosen.teacher.model_copy(update=teacher),
        }
    )


def teacher_scores(bench: Bench, kind: str) -> dict[str, float]:
    """Accuracies of the teacher on crops of the arm's views' size."""
    chosen = extraction(bench, kind)

    def measured() -> dict[str, Any]:
        scorer = Labels(bench.data, chosen.view.size)
        return scorer.accuracies(FrozenTeacher(teacher_of(chosen)), True)

    return remembered(bench, f"teacher-{kind}", TargetsArtifact.open(bench.work / kind).fingerprint, measured)


def student_scores(bench: Bench, arm: Arm, scorer: Labels) -> dict[str, float]:
    """Accuracies of a trained student."""
    run = RunArtifact.open(bench.run(arm))
    return remembered(
        bench,
        arm.name,
        run.fingerprint,
        lambda: scorer.accuracies(load_encoder(str(run.root), 0, CPU), True),
    )


def remembered(bench: Bench, name: str, made_from: str, measure: Any) -> dict[str, float]:
    """Scores from WORK/scores, where they are of the same run or set; otherwise measured."""
    path = bench.work / "scores" / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("made_from") != made_from:
        kept = {"made_from": made_from, "scores": measure()}
        path.parent.mkdir(exist_ok=True)
        write_json(path, kept)
    scores: dict[str, float] = kept["scores"]
    return scores


def arm_row(bench: Bench, name: str, teacher: dict[str, float], students: Sequence[dict[str, float]]) -> dict[str, Any]:
    """An arm's row: scores of teacher and students in per cent, the latter by seed and with their mean."""
    row: dict[str, Any] = {"arm": name}
    stored = bytes_per_view(TargetSet(bench.work / name), bench.stored)
    row |= {f"kb_{part}_per_view": round(size / 1000, 2) for part, size in stored.items()}
    for score in ("knn", "linear"):
        values = [student[score] for student in students]
        row |= {
            f"teacher_{score}": round(teacher[score], 2),
            score: [round(value, 2) for value in values],
            f"{score}_mean": round(statistics.mean(values), 2),
            f"{score}_spread": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        }
    return row


def about(bench: Bench, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings of the result. ``standard_error``: of an accuracy, by the number of test images, in points."""
    errors = [standard_error(row["linear_mean"], bench.test_images) for row in rows]
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
