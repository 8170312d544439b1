"""Atomic writes: a temporary name, fsync, rename, fsync of the folder. Writes to object stores are always atomic.

Temporary names start with ``.tmp-`` and are in the same folder as their target, so that the rename stays on one file
system, and leftovers of a killed process can be found and removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cae2pipe.artifacts.storage import is_local, put_bytes

TEMPORARY = ".tmp-"
FILLED = ("journal", "tars", "images", "views", "latents", "codec.zarr", "checkpoints", "features")
"""The subfolders that commands write to in their output folder."""


def temporary_path(path: Path) -> Path:
    return path.with_name(TEMPORARY + path.name)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, path: Path) -> None:
    """Move a finished file or folder to its final name, durably. An existing folder of that name is replaced."""
    if temporary.is_dir():
        for entry in temporary.rglob("*"):
            fsync_path(entry)
        fsync_path(temporary)
        if path.exists():
            shutil.rmtree(path)
    else:
        fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; it takes its final name when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    # Otherwise the link's target would be written.
    remove_any(temporary)
    try:
        yield temporary
        commit(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as after write()
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    if not is_local(path):
        put_bytes(path, data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def find_debris(root: Path) -> list[Path]:
    """The unfinished files of a killed process in ``root``.

    Only folders of ``FILLED`` are searched, except those that another command writes, by their manifest or locks.
    """
    debris = []
    for folder, names, files in os.walk(root):
        base = Path(folder)
        debris += [base / name for name in (*names, *files) if name.startswith(TEMPORARY)]
        names[:] = [
            name
            for name in names
            if (base != root or name in FILLED)
            and not name.startswith(TEMPORARY)
            and not any((base / name / mark).exists() for mark in ("manifest.json", ".locks"))
        ]
    return debris


def remove_debris(root: Path) -> list[Path]:
    """Remove what ``find_debris`` finds, and return the paths."""
    debris = find_debris(root)
    for path in debris:
        remove_any(path)
    return debris


def remove_any(path: Path) -> None:
    """Remove a file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_empty(root: Path) -> None:
    """Remove ``root`` and its folders if they are empty."""
    for folder, _, _ in os.walk(root, topdown=False):
        with suppress(OSError):  # not empty, or another process was faster
            Path(folder).rmdir()
