"""Scores of many evaluations side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.box import MANIFEST, is_box, open_box
from cae2pipe.errors import SourceError

COLUMNS = ("encoder", "evaluation", "feature", "top1", "top5", "train", "val", "protocol", "folder")


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
    """What the table shows of one result."""
    found = {name: result.get(name, "") for name in ("encoder", "evaluation", "feature", "top1", "top5", "protocol")}
    counts = {part: result["images"][part] for part in ("train", "val")}
    everything = {**found, **counts, "folder": str(folder)}
    return {name: everything[name] for name in COLUMNS}


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """A row with scores in percent, as papers print them."""
    return {**found, "top1": f"{100 * found['top1']:.1f}", "top5": f"{100 * found['top5']:.1f}"}


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, scores in percent."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for found in rows:
        cells = (str(value).replace("|", "\\|") for value in shown(found).values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
