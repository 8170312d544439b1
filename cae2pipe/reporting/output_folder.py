"""Where pages may be written."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.artifact import is_artifact
from cae2pipe.artifacts.storage import file_size, is_local
from cae2pipe.errors import BadInputError


def check_output(out: Path) -> None:
    """Raise BadInputError if ``out`` is a file, or is or is inside a folder that another command made."""
    if file_size(out) is not None:
        raise BadInputError("this is a file, not a folder", where=out, fix="use a folder: --out FOLDER")
    own = out.resolve() if is_local(out) else out
    # The last parent of a URL is no folder, or a bucket.
    for folder in (own, *(own.parents if is_local(own) else list(own.parents)[:-1])):
        if is_artifact(folder):
            raise BadInputError(
                "a report cannot be written into a run, a target set or another folder with a manifest.json",
                where=out if folder == own else f"{out}, which is inside {folder}",
                fix="use another folder: --out FOLDER",
            )
