"""Scores of many evaluations side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.box import MANIFEST, Box, is_foreign, open_box
from cae2pipe.errors import SourceError
from cae2pipe.reporting.markdown import escaped, markdown_table

COLUMNS = ("encoder", "evaluation", "feature", "score", "also", "best", "train", "val", "protocol", "folder")

HEADLINES = {"segment": ("miou", "pixel_accuracy"), "detect": ("ap_box", "ap_mask")}
"""The score of an evaluation and what stands beside it; elsewhere top1 and top5."""
NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "pixel_accuracy": "pixels",
    "ap_box": "AP^b",
    "ap_mask": "AP^m",
}
"""What figures are called in print."""


def headlines(evaluation: str) -> tuple[str, str]:
    """The figure that an evaluation's score is, and the one that stands beside it."""
    return HEADLINES.get(evaluation, ("top1", "top5"))


def score_boxes(roots: Iterable[Path]) -> Iterator[tuple[Path, Box]]:
    """Every finished evaluation in or below some folders, with its box.

    Raises:
        SourceError: a folder does not exist. ManifestError, DamageError: a manifest cannot be read.
    """
    for root in roots:
        if not root.is_dir():
            raise SourceError("no such folder", where=root, fix="give folders that `cae2pipe evaluate` wrote")
        for folder in sorted(path.parent for path in root.rglob(MANIFEST)):
            if is_foreign(folder):
                continue
            box = open_box(folder)
            if box.kind == "scores" and box.facts.get("result"):
                yield folder, box


def collect(roots: Iterable[Path]) -> list[dict[str, Any]]:
    """A row for every finished evaluation in or below the given folders, the best of each kind of evaluation first.

    Raises:
        SourceError: a folder does not exist, or there is not one score.
    """
    rows: dict[Path, dict[str, Any]] = {}
    roots = list(roots)
    for folder, box in score_boxes(roots):
        rows[folder.resolve()] = row(box.facts["result"], folder)
    if not rows:
        raise SourceError(
            "there is no finished evaluation here",
            where=", ".join(str(root) for root in roots),
            fix="run `cae2pipe evaluate knn ENCODER DATA OUT`, then give OUT",
        )
    return sorted(rows.values(), key=lambda found: (found["evaluation"], -found["score"], str(found["folder"])))


def row(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the table shows of one result: ``score`` and ``also`` are pairs of name and value; ``best`` is the best
    epoch's score, where one was looked for."""
    first, second = headlines(result["evaluation"])
    found = {name: result.get(name, "") for name in ("encoder", "evaluation", "feature", "protocol")}
    counts = {part: result["images"][part] for part in ("train", "val")}
    best = result["best"][first] if "best" in result else None
    scores = {"score": result[first], "metric": first, "also": {second: result[second]}, "best": best}
    everything = {**found, **counts, **scores, "folder": str(folder)}
    return {name: everything[name] for name in (*COLUMNS, "metric")}


def protocols(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The protocols of a table in the order in which they first come. Their numbers, from 1, stand in its rows."""
    return list(dict.fromkeys(found["protocol"] for found in rows))


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows as they are printed: scores in percent, protocols by number."""
    numbers = {text: str(number) for number, text in enumerate(protocols(rows), 1)}

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    rows_shown = []
    for found in rows:
        (name, value), *_ = found["also"].items()
        cells = {
            "score": f"{NAMES[found['metric']]} {percent(found['score'])}",
            "also": f"{NAMES[name]} {percent(value)}",
            "best": "" if found["best"] is None else percent(found["best"]),
            "protocol": numbers[found["protocol"]],
        }
        rows_shown.append({column: cells.get(column, str(found[column])) for column in COLUMNS})
    return rows_shown


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, and the protocols below it."""
    lines = markdown_table(COLUMNS, [list(found.values()) for found in shown(rows)])
    return "\n".join([*lines, "", *(f"{number}. {escaped(text)}" for number, text in enumerate(protocols(rows), 1))])
