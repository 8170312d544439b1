"""Staged units: written file by file to a temporary folder, then moved to their final path as a whole.

A local unit's files are in a folder ``.tmp-NAME`` of the artifact until they are flushed and renamed. A remote one's
are in the machine's folder for temporary files until they are uploaded. Either way the unit exists only once the
artifact lists it, so a killed run leaves temporary files but never half a unit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cae2pipe.artifacts.atomic import TEMPORARY, fsync_path, remove_any
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.inside import inside
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import is_local, put_file


def stage_path(root: Path, name: str) -> Path:
    """The local folder in which the unit's files are collected. Raises BadInputError if the name is invalid."""
    inside(root, name)
    flat = TEMPORARY + name.replace("/", "+")
    if is_local(root):
        return root / flat
    # The same path in the next run, so that it finds this run's leftovers.
    artifact = hashlib.blake2b(str(root).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"cae2pipe-{os.getuid()}" / artifact / flat


@contextmanager
def staged(root: Path, name: str) -> Iterator[StagedUnit]:
    """A staging folder for the unit's files, always removed at the end."""
    stage = StagedUnit(root, name)
    try:
        yield stage
    finally:
        stage.discard()


class StagedUnit:
    """Files of one unit of the artifact ``root``."""

    def __init__(self, root: Path, name: str):
        self.root = root
        self.folder = stage_path(root, name)
        remove_any(self.folder)
        self.folder.mkdir(parents=True, mode=0o700 if not is_local(root) else 0o777)

    def path(self, relative: str) -> Path:
        """Where to write the file or folder whose final path is ``root / relative``. Raises as ``inside``."""
        inside(self.root, relative)
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def entries(self, *pieces: str) -> dict[str, FileEntry]:
        """Size and SHA-256 of every file at these relative paths, by its path relative to the root."""
        files = sorted(path for piece in pieces for path in _files(self.folder / piece))
        return {path.relative_to(self.folder).as_posix(): file_entry(path) for path in files}

    def commit(self, *pieces: str) -> dict[str, FileEntry]:
        """Move the files and folders at these relative paths to their final paths, durably, replacing existing ones.

        Returns:
            As ``entries``.

        Raises:
            BadInputError: as ``inside``.
        """
        goals = [inside(self.root, piece) for piece in pieces]
        entries = self.entries(*pieces)
        if not is_local(self.root):
            for name in entries:
                put_file(self.folder / name, self.root / name)
            return entries
        for piece, goal in zip(pieces, goals, strict=True):
            source = self.folder / piece
            for path in (source, *source.rglob("*")) if source.is_dir() else (source,):
                fsync_path(path)
            goal.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir() or goal.is_dir():
                remove_any(goal)
            source.replace(goal)
            fsync_path(goal.parent)
        return entries

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_stages(root: Path, names: list[str]) -> None:
    """Remove temporary files of these units that a killed run left."""
    for name in names:
        remove_any(stage_path(root, name))


def _files(path: Path) -> list[Path]:
    return [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
