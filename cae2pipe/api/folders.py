"""Python API for any folder that a stage made: what it is, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.api.path_lists import optional_local, optional_path
from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.storage import to_path
from cae2pipe.artifacts.verification import Verification
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.repair import repair as run_repair
from cae2pipe.stages.verify import verify as run_verify


@checked
def inspect(path: str | Path) -> dict[str, Any]:
    """What a folder made by cae2pipe is, what it was made from and what it contains: ``cae2pipe inspect``.

    Raises:
        ManifestError: the folder was not made by cae2pipe.
    """
    return inspect_folder(to_path(path))


@checked
def verify(path: str | Path, *, progress: Progress = True) -> Verification:
    """Check every file of a folder against its manifest: ``cae2pipe verify``. ``problems`` of the result lists what is
    wrong; it is empty if the folder is intact.

    Raises:
        ManifestError: the folder was not made by cae2pipe.
    """
    with reporting(progress, "verify") as report:
        return run_verify(to_path(path), report)


@checked
def repair(
    outcome: Verification,
    *,
    source: str | Path | None = None,
    labels: str | Path | None = None,
    teacher_weights: str | Path | None = None,
    device: str = "auto",
    workers: int = -1,
    progress: Progress = True,
) -> Verification:
    """Rebuild exactly what is damaged, and check again: ``cae2pipe verify --repair``.

    Args:
        source: the images or the shard set that the folder was made from.
        labels: the ground truth that was given to ``shard``.
        teacher_weights: the teacher's weights, if they came from a local file.

    Raises:
        Cae2pipeError: the folder cannot be repaired; the message says what is missing.
    """
    with reporting(progress, "repair") as report:
        run_repair(
            outcome,
            report,
            source=optional_path(source),
            labels=optional_path(labels),
            weights=optional_local(teacher_weights),
            device=device,
            workers=workers,
        )
        return run_verify(outcome.path, report) if outcome.problems else outcome
