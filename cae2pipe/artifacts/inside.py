"""Paths inside an output folder: no name or link in the folder leads out of it."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.storage import is_local
from cae2pipe.errors import BadInputError


def inside(root: Path, relative: str) -> Path:
    """The path ``root / relative``, for a file or folder to write or replace there.

    Raises:
        BadInputError: ``relative`` is absolute, or has parts such as ``..``; or a folder on the way is a symbolic link.
    """
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise BadInputError(
            f"{relative!r} is not a path inside the folder",
            where=root,
            fix="do not use the data that this name comes from",
        )
    if is_local(root):
        folder = root
        for part in parts[:-1]:
            folder = folder / part
            refuse_link(folder)
    return root / relative


def refuse_link(path: Path) -> None:
    """Raise BadInputError if a local path is a symbolic link."""
    if path.is_symlink():
        raise BadInputError(
            "this is a symbolic link, and nothing is written through links",
            where=path,
            fix="replace the link by its target, or give the target's folder",
        )
