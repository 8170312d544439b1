"""Tables of scores: of students by views and teachers, and of the models that work as teachers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.table_parts import goal, read, significant, table


def views(results: Path) -> str:
    """Scores after the last epoch by number and fidelity of views, means over the runs of all devices and seeds."""
    contents = [json.loads(path.read_text()) for path in sorted(results.glob("views-*.json"))]
    epochs, image = contents[0]["settings"]["epochs"], contents[0]["settings"]["pixels_once_kb"]
    groups: dict[tuple[bool, int, float], list[dict[str, Any]]] = {}
    for row in (row for each in contents for row in each["rows"] if row["epoch"] == epochs):
        groups.setdefault((row["arm"].startswith("fresh"), row["views"], -row["fidelity"]), []).append(row)
    # kB of latents per view: of the most views, since rows are rounded; of sets of several versions, the smallest.
    view: dict[float, float] = {}
    for (_, count, minus), rows in sorted(groups.items(), key=lambda item: item[0][1]):
        view[minus] = min(row["kb_latents"] for row in rows) / count
    lines = []
    for (fresh, count, minus), rows in sorted(groups.items()):
        means = [mean(row[name] for row in rows) for name in ("train_loss", "held_out_loss", "knn", "linear")]
        lines.append(
            (
                f"{count}, a fresh crop in every epoch" if fresh else str(count),
                f"{-minus:g}",
                f"{image + count * view[minus]:,.0f}",
                f"{epochs / count:.3g}",
                *(f"{value:.3f}" for value in means[:2]),
                *(f"{value:.1f}" for value in means[2:]),
                str(len(rows)),
            )
        )
    heads = ("views", "fidelity", "kB per image", "showings", "training loss", "held-out loss", "kNN", "linear", "runs")
    return table(heads, lines)


def teacher_grid(results: Path) -> str:
    """Scores by what the teacher sees: of the teacher, and means over the students of all seeds with their spread."""
    named = {
        "own": "112 pixels, as the student",
        "enlarged": "112 pixels, enlarged to 224",
        "finer": "224 pixels, reduced for the student",
    }
    lines = []
    for row in read(results, "teacher_grid")["rows"]:
        scores = [f"{row[f'{name}_mean']:.1f} ± {row[f'{name}_spread']:.1f}" for name in ("knn", "linear")]
        teacher = [f"{row[f'teacher_{name}']:.1f}" for name in ("knn", "linear")]
        sizes = [f"{row[f'kb_{part}_per_view']:.1f}" for part in ("pixels", "latents")]
        lines.append((named[row["arm"]], *sizes, *teacher, *scores))
    heads = (
        "the teacher sees",
        "kB of pixels per view",
        "of latents",
        "teacher, kNN",
        "linear",
        "student, kNN",
        "linear",
    )
    return table(heads, lines)


def several_teachers(results: Path) -> str:
    """Students of two teachers and of each alone: means over the seeds with their spread."""
    named = {"vit-ti": "ViT-Ti", "lite0": "EfficientNet-Lite0", "both": "both"}
    scores = ("mean_knn", "mean_linear", "class_knn", "class_linear")
    lines = []
    for row in read(results, "several_teachers")["rows"]:
        teacher = [row.get(f"teacher_{name}") for name in scores[:2]]
        lines.append(
            (
                named[row["arm"]],
                f"{row['kb_latents_per_view']:.1f}",
                *("" if value is None else f"{value:.1f}" for value in teacher),
                *(spread(row, name) for name in scores),
            )
        )
    heads = (
        "teachers",
        "kB per view",
        "teacher, kNN",
        "linear",
        "mean patch, kNN",
        "linear",
        "class token, kNN",
        "linear",
    )
    return table(heads, lines)


def teacher_step(results: Path) -> str:
    """What a second teacher adds to a step."""
    rows = [
        (
            row["size"].capitalize(),
            *(significant(row[f"{name} ms"]["median"], 3) for name in ("one", "head", "two")),
            f"{row['ratio']:.3f}",
        )
        for row in read(results, "teacher_step")["rows"]
    ]
    return table(
        ("student", "one teacher, ms", "second head alone, ms", "two teachers, ms", "ratio (goal ≤ 1.05)"), rows
    )


def spread(row: Mapping[str, Any], name: str) -> str:
    """Mean ± standard deviation of a score over the seeds; empty if it was not measured."""
    if f"{name}_mean" not in row:
        return ""
    deviation = row[f"{name}_spread"]
    return f"{row[f'{name}_mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def teachers(results: Path) -> str:
    """How many models of every family work as teachers, and why the others are refused."""
    if not (results / "teachers-cpu.json").exists():
        return "Nothing has been measured."
    result = read(results, "teachers")
    claims = [(row["name"], significant(row["value"], 3), goal(row, "")) for row in result["checks"]]
    rows = [
        (
            row["library"],
            row["family"].replace("_", r"\_"),
            f"{row['work']} of {row['models']}",
            str(row["tokens"]) if row["library"] == "timm" else "",
            "; ".join(f"{count}: {reason}" for count, reason in row["refused"]).replace("|", "/").replace("_", r"\_"),
        )
        for row in result["rows"]
    ]
    heads = ("library", "family", "work", "as tokens, without a stage", "refused")
    fixed = [
        (f"`{row['name']}`", row["library"], size, said.removeprefix("refused: ").split("! Mismatching")[0])
        for row in result["settings"]["values"]
        for size, said in row.items()
        if size.isdigit() and isinstance(said, str)
    ]
    parts = [table(("what", "figure", "goal"), claims), table(heads, rows)]
    parts += [table(("compared model", "library", "refused at", "reason"), fixed)] if fixed else []
    return "\n\n".join(parts)


def teacher_tour(results: Path) -> str:
    """Ten teachers from images to an exported student."""
    if not (results / "teacher_tour-cpu.json").exists():
        return "Nothing has been measured."
    rows = [
        (row["family"], f"`{row['teacher']}`", row["library"], row.get("latents", ""), "yes" if row["ended"] else "no")
        for row in read(results, "teacher_tour")["rows"]
    ]
    return table(("family", "teacher", "library", "stored latents", "verified live, trained, exported"), rows)
