"""One writer a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cae2pipe.errors import BadInputError, LockedError


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the folder's lock. The kernel drops it when the process ends, however it ends.

    Raises:
        LockedError: another process holds it. BadInputError: the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise BadInputError("this is a file, and a folder is needed", where=root, fix="give another folder") from None
    except OSError as error:
        raise BadInputError(
            f"this folder cannot be written: {error.strerror}", where=root, fix="give another folder"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                "another process is writing this folder",
                where=root,
                fix="wait for it to end, or stop it; then run the same command again",
            ) from None
        yield
