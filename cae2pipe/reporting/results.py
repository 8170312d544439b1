"""Scores of many evaluations side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.box import MANIFEST, is_box, open_box
from cae2pipe.errors import SourceError

COLUMNS = ("encoder", "evaluation", "feature", "top1", "top5", "best", "train", "val", "protocol", "folder")


def collect(roots: Iterable[Path]) -> list[dict[str, Any]]:
    """A row for every finished evaluation in or below the given folders, the best of each kind of evaluation first.

    Raises:
        SourceError: a folder does not exist, or there is not one score.
    """
    rows: dict[Path, dict[str, Any]] = {}
    roots = list(roots)
    for root in roots:
        if not root.is_dir():
            raise SourceError("no such folder", where=root, fix="give folders that `cae2pipe evaluate` wrote")
        for manifest in sorted(root.rglob(MANIFEST)):
            folder = manifest.parent
            if is_box(folder, "scores") and (result := open_box(folder).facts.get("result")):
                rows[folder.resolve()] = row(result, folder)
    if not rows:
        raise SourceError(
            "there is no finished evaluation here",
            where=", ".join(str(root) for root in roots),
            fix="run `cae2pipe evaluate knn ENCODER DATA OUT`, then give OUT",
        )
    return sorted(rows.values(), key=lambda found: (found["evaluation"], -found["top1"], str(found["folder"])))


def row(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the table shows of one result; ``best`` is the best epoch's top-1 accuracy, where one was looked for."""
    found = {name: result.get(name, "") for name in ("encoder", "evaluation", "feature", "top1", "top5", "protocol")}
    counts = {part: result["images"][part] for part in ("train", "val")}
    best = result["best"]["top1"] if "best" in result else None
    everything = {**found, **counts, "best": best, "folder": str(folder)}
    return {name: everything[name] for name in COLUMNS}


def protocols(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The protocols of a table in the order in which they first come. Their numbers, from 1, stand in its rows."""
    return list(dict.fromkeys(found["protocol"] for found in rows))


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows as they are printed: scores in percent, protocols by number."""
    numbers = {text: str(number) for number, text in enumerate(protocols(rows), 1)}

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    return [
        {name: str(value) for name, value in found.items()}
        | {name: percent(found[name]) for name in ("top1", "top5", "best")}
        | {"protocol": numbers[found["protocol"]]}
        for found in rows
    ]


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, and the protocols below it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for found in shown(rows):
        lines.append("| " + " | ".join(value.replace("|", "\\|") for value in found.values()) + " |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(protocols(rows), 1))])
