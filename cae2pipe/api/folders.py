"""Any folder from Python: what it is, and whether it is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.places import place
from cae2pipe.artifacts.verification import Verification
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.repair import repair as run_repair
from cae2pipe.stages.verify import verify as run_verify


def inspect(path: str | Path) -> dict[str, Any]:
    """What a folder made by cae2pipe is, what it was made from and what it holds: ``cae2pipe inspect``.

    Raises:
        ManifestError: not a folder of ours.
    """
    return inspect_folder(place(path))


def verify(
    path: str | Path,
    *,
    repair: bool = False,
    source: str | Path | None = None,
    labels: str | Path | None = None,
    teacher_weights: str | Path | None = None,
    device: str = "auto",
    workers: int = -1,
    progress: Progress = True,
) -> Verification:
    """Check every file of a folder against its manifest: ``cae2pipe verify``. ``problems`` of the outcome lists what is
    wrong, [] where all is well.

    Args:
        repair: make again exactly what is damaged, then check. source: with it, the images or the shard set that the
            folder was made from. labels: with it, the ground truth that ``shard`` was given. teacher_weights: with it,
            the teacher's weights, if they came from a local file. device, workers: with it.

    Raises:
        Cae2pipeError: not a folder of ours, or it cannot be repaired.
    """
    root = place(path)
    with reporting(progress, "verify") as report:
        outcome = run_verify(root, report)
    if not repair:
        return outcome
    with reporting(progress, "repair") as report:
        run_repair(
            outcome,
            report,
            source=None if source is None else place(source),
            labels=None if labels is None else place(labels),
            weights=None if teacher_weights is None else Path(teacher_weights),
            device=device,
            workers=workers,
        )
        return run_verify(root, report) if outcome.problems else outcome
