"""Write locks: one writer per part of a folder, and one at a time for what all parts share.

On a local or shared file system a lock is the kernel's (``flock`` on a file in ``.locks/``): it ends with its process,
however that ends. On object stores it is an object, created only if absent and renewed while its owner lives; one that
has not been renewed for ``STALE`` seconds, or whose owner is known to be dead, counts as free.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import TypedDict

from cae2pipe.artifacts.atomic import FILLED
from cae2pipe.artifacts.inside import refuse_link
from cae2pipe.artifacts.json_files import parse_json
from cae2pipe.artifacts.storage import (
    create_exclusively,
    file_sizes,
    is_local,
    no_conditional_writes,
    put_bytes,
    read_bytes,
    remove,
)
from cae2pipe.artifacts.work_share import WHOLE, WorkShare
from cae2pipe.errors import BadInputError, Cae2pipeError, LockedError, ManifestError, ReadOnlyError, StorageError

FOLDER = ".locks"
STALE = 120.0
"""Seconds without renewal after which a lock object's owner is considered dead."""
BEAT = 20.0
"""Seconds between renewals."""
POLL = 1.0
"""Seconds between checks of a lock while waiting for it."""


@contextmanager
def writing(root: Path, part: WorkShare = WHOLE) -> Iterator[None]:
    """Hold a part of the folder (default: all of it).

    Raises:
        LockedError: another process holds this part or one that overlaps it.
        ReadOnlyError: the folder cannot be written. BadInputError: a symbolic link in it leads out of it.
    """
    made: list[Path] = []
    if is_local(root):
        for name in (*FILLED, FOLDER, "shards", "teachers", "metrics.jsonl"):
            refuse_link(root / name)
        made = [path for path in (root, *root.parents) if not path.exists()]
    with _taken(root, _part_name(part)) as mine:
        if not mine:
            raise _locked(root, part, part)
        # Two processes that start at the same time may both see the other and stop, but never both continue.
        for other in _other_parts(root, part):
            with _taken(root, _part_name(other)) as free:
                if not free:
                    raise _locked(root, part, other)
        try:
            yield
        except BaseException:
            if is_local(root):
                _leave_nothing(root, _part_name(part), made)
            raise


def _leave_nothing(root: Path, mine: str, made: list[Path]) -> None:
    """Remove what a writer that failed has made, if it has written nothing: its locks, and these folders.

    ``mine`` is the lock that it holds. Nothing is removed while another process holds one.
    """
    with suppress(OSError, BadInputError), ExitStack() as locks:  # not empty, or not writable
        if os.listdir(root) != [FOLDER]:  # noqa: PTH208
            return
        for name in sorted(os.listdir(root / FOLDER)):  # noqa: PTH208
            if name != mine and not locks.enter_context(_flock(root, name)):
                return
            (root / FOLDER / name).unlink()
        for folder in (root / FOLDER, *made):
            folder.rmdir()


@contextmanager
def holding(root: Path, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold what all parts share, such as the calibration. If it is held, call ``waiting`` once and wait."""
    waited = False
    while True:
        with _taken(root, name) as mine:
            if mine:
                yield
                return
        if waiting and not waited:
            waiting()
            waited = True
        time.sleep(POLL)


def can_lock(root: Path) -> bool:
    """Whether locks work here: not on object stores without conditional writes."""
    if is_local(root):
        return True
    probe = root / FOLDER / f"probe-{uuid.uuid4().hex}"
    try:
        return create_exclusively(probe, b"1") and not create_exclusively(probe, b"2")
    except StorageError as error:
        if error.what == no_conditional_writes(probe).what:
            return False
        raise
    finally:
        remove([probe])


def _part_name(part: WorkShare) -> str:
    return f"part-{part.number}-of-{part.count}"


def _other_parts(root: Path, part: WorkShare) -> list[WorkShare]:
    """Parts, other than this one, that overlap it and were ever locked here."""
    others = []
    for name in file_sizes(root / FOLDER):
        words = name.split("-")
        if words[0] == "part" and len(words) == 4 and words[1].isdigit() and words[3].isdigit():
            other = WorkShare(int(words[1]), int(words[3]))
            if other != part and other.overlaps(part):
                others.append(other)
    return others


def _locked(root: Path, part: WorkShare, other: WorkShare) -> LockedError:
    what = "another process is writing this folder"
    if part != WHOLE or other != WHOLE:
        what += f": part {other}" + (f", which overlaps part {part}" if part != other else "")
    return LockedError(what, where=root, fix="wait for it to end, or stop it; then run the same command again")


def _taken(root: Path, name: str) -> AbstractContextManager[bool]:
    """A context manager that gives True where the lock was free and is now held, else False."""
    return _flock(root, name) if is_local(root) else _lease(root, name)


@contextmanager
def _flock(root: Path, name: str) -> Iterator[bool]:
    file: BufferedWriter | None = None
    while file is None:
        file = _open_lock(root, name)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            yield False
            return
        # A writer that failed may have removed the file since it was opened.
        if not os.fstat(file.fileno()).st_nlink:
            file.close()
            file = None
    with file:
        yield True


def _open_lock(root: Path, name: str) -> BufferedWriter:
    # Does not change the file, not even its time.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    for last in (*[False] * 9, True):
        try:
            (root / FOLDER).mkdir(parents=True, exist_ok=True)
            return os.fdopen(os.open(root / FOLDER / name, flags, 0o666), "ab")
        except (FileExistsError, NotADirectoryError):
            raise BadInputError("this is a file, not a folder", where=root, fix="give another folder") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not last:  # another writer has removed the folder just now
                continue
            raise ReadOnlyError(
                f"this folder cannot be written: {error.strerror}", where=root, fix="give another folder"
            ) from None
    raise AssertionError


@contextmanager
def _lease(root: Path, name: str) -> Iterator[bool]:
    path = root / FOLDER / name
    owner: Owner = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    if not _create(path, owner):
        yield False
        return
    stop = threading.Event()
    beat = threading.Thread(target=_renew, args=(path, owner, stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        remove([path])


class Owner(TypedDict):
    """Who holds a lease."""

    id: str
    host: str
    pid: int


def _create(path: Path, owner: Owner) -> bool:
    data = _sign(owner)
    try:
        if create_exclusively(path, data):
            return True
        if _alive(path):
            return False
        remove([path])
        return create_exclusively(path, data)
    except StorageError as error:
        if error.what != no_conditional_writes(path).what:
            raise
        return True  # locks do not work here: see can_lock


def _sign(owner: Owner) -> bytes:
    return json.dumps({**owner, "time": time.time()}).encode()


def _alive(path: Path) -> bool:
    try:
        owner = parse_json(read_bytes(path), path, fix="remove it")
        if owner["host"] == socket.gethostname() and not _process_lives(owner["pid"]):
            return False
        return bool(time.time() - owner["time"] < STALE)
    except FileNotFoundError:
        return False
    except (ManifestError, KeyError, TypeError):
        return True


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _renew(path: Path, owner: Owner, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        try:
            put_bytes(path, _sign(owner))
        except Cae2pipeError:
            continue  # the work itself will fail on this storage, and report it
