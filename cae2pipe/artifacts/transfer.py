"""One file of a folder, copied to another folder between disks and object stores.

The bytes are compared with the manifest's entry on the way. A file gets its final name only if they agree, so nothing
else is ever there, wherever the copy is interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from cae2pipe.artifacts.atomic import replacing
from cae2pipe.artifacts.digest import PIECE
from cae2pipe.artifacts.file_checks import CHANGED, MISSING, check_file
from cae2pipe.artifacts.inside import inside
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.staging import staged
from cae2pipe.artifacts.storage import is_local, open_file, put_bytes, put_file, read_range
from cae2pipe.errors import DamageError

MARKS = ".copying"
"""The folder of the destination that holds a mark for every unit that has arrived, until its manifest is written."""
Moved = Callable[[int], None]
"""Called with numbers of bytes as they arrive. What it raises ends the copy."""


def copy_file(source: Path, root: Path, relative: str, *, entry: FileEntry, moved: Moved) -> None:
    """Copy the file ``relative`` of the folder ``source`` into the folder ``root``, where it replaces one of that name.

    A large file on its way from one object store to another is in the machine's folder for temporary files meanwhile.

    Raises:
        DamageError: the file is missing or differs from its entry. BadInputError: as ``inside``.
    """
    origin, path = source / relative, inside(root, relative)
    if is_local(path):
        with replacing(path) as temporary:
            _write(origin, temporary, entry, moved)
    elif entry["bytes"] < PIECE:
        data = b"".join(checked_pieces(origin, entry))
        put_bytes(path, data)
        moved(len(data))
    elif is_local(origin):
        for _ in checked_pieces(origin, entry):
            moved(0)
        put_file(origin, path, moved)
    else:
        with staged(root, relative) as stage:
            local = stage.path(relative)
            _write(origin, local, entry, lambda count: moved(0))
            put_file(local, path, moved)


def checked_pieces(path: Path, entry: FileEntry) -> Iterator[bytes]:
    """A file's bytes, piece by piece.

    Raises:
        DamageError: the file is missing, or has another size, or, once all pieces have been yielded, another SHA-256.
    """
    size, digest, offset = entry["bytes"], hashlib.sha256(), 0
    # A small remote file is read by one request, which shows whether it is longer.
    if (is_local(path) or not 0 < size < PIECE) and (problem := check_file(path, entry, digests=False)):
        raise problem
    try:
        for piece in _pieces(path, size):
            digest.update(piece)
            offset += len(piece)
            yield piece
    except FileNotFoundError:
        raise DamageError(MISSING, where=path) from None
    if offset != size or digest.hexdigest() != entry["sha256"]:
        raise check_file(path, entry, digests=False) or DamageError(CHANGED, where=path)


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    if is_local(path):
        try:
            with open_file(path) as file:
                while piece := file.read(PIECE):
                    yield piece
        except OSError as error:
            error.filename = error.filename or str(path)  # not what is being written
            raise
        return
    for offset in range(0, size, PIECE):
        yield read_range(path, offset, min(PIECE, size + 1 - offset))


def _write(origin: Path, local: Path, entry: FileEntry, moved: Moved) -> None:
    with local.open("wb") as file:
        for piece in checked_pieces(origin, entry):
            file.write(piece)
            moved(len(piece))
