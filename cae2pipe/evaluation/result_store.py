"""The artifact of an evaluation: opening it, reading or saving its result, marking it complete."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.artifact import ScoresArtifact, is_artifact
from cae2pipe.artifacts.atomic import remove_debris, write_json
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.file_checks import check_file
from cae2pipe.config.base import Settings
from cae2pipe.config.resume_options import completed_as, resuming
from cae2pipe.training.checkpoint import CHECKPOINTS_FOLDER
from cae2pipe.training.metrics import METRICS_FILE

RESULT = "result.json"
BULKY = ("losses", "history", "per_class", "settings")
"""Entries of ``result.json`` that the manifest omits."""


def open_scores(
    root: Path, asked: dict[str, Any], kind: type[Settings]
) -> tuple[ScoresArtifact, dict[str, Any] | None]:
    """The artifact of an evaluation, created or opened, and its result if it exists.

    Args:
        kind: of the evaluation's settings.

    Raises:
        MismatchError: the folder holds another evaluation.
    """
    idle = is_idle(root)
    if idle:
        (root / METRICS_FILE).unlink(missing_ok=True)
    artifact = ScoresArtifact.open_or_create(
        root,
        asked,
        facts={},
        restart=idle,
        fix=partial(resuming, kind, fix="give another output folder", does="gives its score"),
        completed=completed_as(kind),
    )
    remove_debris(root)
    result = stored_result(artifact)
    if result:
        # A killed run may not have marked it complete.
        mark_complete(artifact, result)
    return artifact, result


def is_idle(root: Path) -> bool:
    """Whether a folder holds an attempt that has nothing to resume from (after refused settings, or stopped before its
    result was recorded), so that any other may replace it."""
    return (
        is_artifact(root, "scores")
        and not ScoresArtifact.open(root).units
        and not any((root / CHECKPOINTS_FOLDER).glob("*"))
    )


def stored_result(artifact: ScoresArtifact) -> dict[str, Any] | None:
    """The result in an artifact, if its files are unchanged."""
    if "result" not in artifact.units:
        return None
    files = artifact.units["result"]["files"]
    if any(check_file(artifact.root / name, entry) for name, entry in files.items()):
        return None
    result: dict[str, object] = json.loads((artifact.root / RESULT).read_text(encoding="utf-8"))
    return result


def save_result(
    artifact: ScoresArtifact, encoder: str, figures: dict[str, Any], files: dict[str, Any]
) -> dict[str, Any]:
    """Write the result and the manifest's entries of its files, and mark the artifact complete.

    Args:
        artifact: of the evaluation.
        encoder: its displayed name.
        figures: the entries of the result that only this kind of evaluation has.
        files: the manifest's entries of the other files.

    Returns:
        The result: ``figures``, and what every evaluation records.
    """
    asked = artifact.identity
    result = {
        "evaluation": asked["evaluation"],
        "encoder": encoder,
        **figures,
        "settings": asked["settings"],
        "encoder_identity": asked["encoder"],
        "data": asked["data"],
        "fingerprint": artifact.fingerprint,
    }
    write_json(artifact.root / RESULT, result)
    artifact.add("result", {"files": {**files, RESULT: file_entry(artifact.root / RESULT)}})
    mark_complete(artifact, result)
    return result


def mark_complete(artifact: ScoresArtifact, result: dict[str, Any]) -> None:
    """Mark an evaluation with a result complete, and remove the files that were only needed to resume it."""
    artifact.facts["result"] = {name: value for name, value in result.items() if name not in BULKY}
    artifact.save(complete=True)
    shutil.rmtree(artifact.root / CHECKPOINTS_FOLDER, ignore_errors=True)
