"""Paths inside a folder that is written: nothing in the folder leads a writer out of it."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.storage import is_local
from cae2pipe.errors import BadInputError


def inside(root: Path, relative: str) -> Path:
    """The place ``root / relative``, for what is to be written or replaced there.

    Raises:
        BadInputError: ``relative`` is absolute, or has parts such as ``..``; or a folder on the way is a symbolic link.
    """
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise BadInputError(
            f"{relative!r} is no path inside the folder", where=root, fix="do not use what this name comes from"
        )
    if is_local(root):
        folder = root
        for part in parts[:-1]:
            folder = folder / part
            refuse_link(folder)
    return root / relative


def refuse_link(path: Path) -> None:
    """Raise BadInputError where a local path is a symbolic link."""
    if path.is_symlink():
        raise BadInputError(
            "this is a symbolic link, and files are not written to where links lead",
            where=path,
            fix="put what it leads to in its place, or give the folder that it leads to",
        )
