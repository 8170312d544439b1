"""Python API for any folder that a stage made: what it is, whether it is intact; copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.api.path_lists import known_pixels, optional_local, optional_path
from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.storage import to_path
from cae2pipe.artifacts.verification import Verification
from cae2pipe.stages.copy_set import WORKERS, Copied, copy_set
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
def verify(path: str | Path, *, pixels: str | Path | None = None, progress: Progress = True) -> Verification:
    """Check every file of a folder against its manifest: ``cae2pipe verify``. ``problems`` of the result lists what is
    wrong; it is empty if the folder is intact.

    Args:
        path: the folder or URL.
        pixels: of a target set by reference, the folder or URL with its pixels, which are checked with it; by default
            that of an open set.

    Raises:
        ManifestError: the folder was not made by cae2pipe.
    """
    with reporting(progress, "verify") as report:
        return run_verify(to_path(path), report, known_pixels(path, pixels))


@checked
def copy(
    source: str | Path,
    destination: str | Path,
    *,
    views: int | None = None,
    check: bool = False,
    workers: int = WORKERS,
    progress: Progress = True,
) -> Copied:
    """Copy a shard set or a target set between disks and object stores, or resume that: ``cae2pipe copy``.

    Every file is compared with the manifest on the way. The destination's manifest is written last, so that its readers
    see what was there before, or everything. A set that has grown is copied again to bring what is new.

    Args:
        source: the set; a shard set and added teachers inside a target set are copied with it.
        destination: a new folder, or one that holds this set or a part of it; a path or a URL.
        views: of a target set, only this many views of every image.
        check: also read what is there already, and copy files again that are damaged.
        workers: threads.

    Raises:
        MismatchError, ManifestError: the destination holds something else. DamageError: a file of ``source`` is
            damaged. StorageError: a store does not answer.
    """
    with reporting(progress, "copy") as report:
        return copy_set(to_path(source), to_path(destination), report=report, views=views, check=check, workers=workers)


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
        source: the images, the shard set or the target set that the folder was made from.
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
        return run_verify(outcome.path, report, outcome.pixels) if outcome.problems else outcome
