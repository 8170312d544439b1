"""The box of an evaluation: opened, its result read or saved, marked complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import remove_debris, write_json
from cae2pipe.artifacts.box import MANIFEST, ScoresBox, check_file, is_box
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.supervised.loop import CHECKPOINTS, METRICS

RESULT = "result.json"
BULKY = ("losses", "history", "per_class", "settings")
"""What ``result.json`` has and the manifest does without."""


def open_scores(root: Path, asked: dict[str, Any]) -> tuple[ScoresBox, dict[str, Any] | None]:
    """The box of an evaluation, created or opened, and its result where it is there already.

    Raises:
        MismatchError: the folder holds another evaluation.
    """
    forget_idle(root)
    box = ScoresBox.open_or_create(root, asked, facts={}, fix="give another output folder")
    remove_debris(root)
    result = stored_result(box)
    if result:
        # A killed run may have left it open.
        mark_complete(box, result)
    return box, result


def forget_idle(root: Path) -> None:
    """Remove the manifest of an attempt that has nothing to show, refused settings say: others may follow."""
    if is_box(root, "scores") and not ScoresBox.open(root).units and not any((root / CHECKPOINTS).glob("*")):
        (root / MANIFEST).unlink()
        (root / METRICS).unlink(missing_ok=True)


def stored_result(box: ScoresBox) -> dict[str, Any] | None:
    """The result that a box already holds, if its files are as they were written."""
    if "result" not in box.units:
        return None
    files = box.units["result"]["files"]
    if any(check_file(box.root / name, entry) for name, entry in files.items()):
        return None
    result: dict[str, object] = json.loads((box.root / RESULT).read_text(encoding="utf-8"))
    return result


def save_result(box: ScoresBox, result: dict[str, Any], files: dict[str, Any]) -> None:
    """Write the result down, with the manifest's entries of the files that belong to it, and mark the box complete."""
    write_json(box.root / RESULT, result)
    box.add("result", {"files": {**files, RESULT: file_entry(box.root / RESULT)}})
    mark_complete(box, result)


def mark_complete(box: ScoresBox, result: dict[str, Any]) -> None:
    """Mark an evaluation complete whose result is there, and remove what a killed one would have resumed from."""
    box.facts["result"] = {name: value for name, value in result.items() if name not in BULKY}
    box.save(complete=True)
    shutil.rmtree(box.root / CHECKPOINTS, ignore_errors=True)
