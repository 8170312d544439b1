"""Locks: overlapping parts exclude each other, others do not; on files and on objects."""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
import uuid
from pathlib import Path

import pytest

from cae2pipe.artifacts import lock
from cae2pipe.artifacts.lock import can_lock, holding, writing
from cae2pipe.artifacts.storage import file_sizes, put_bytes, to_path
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.errors import LockedError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "local":
        return tmp_path
    return to_path(f"memory://{uuid.uuid4().hex}")


def test_a_part_is_held_once_and_free_again_afterwards(root: Path) -> None:
    for _ in range(2):
        with writing(root), pytest.raises(LockedError, match="another process is writing"), writing(root):
            pass


def test_overlapping_parts_exclude_each_other_and_others_do_not(root: Path) -> None:
    with writing(root, WorkShare(1, 2)):
        with writing(root, WorkShare(2, 4)), writing(root, WorkShare(4, 4)):
            pass
        for other in (WorkShare(1, 1), WorkShare(3, 4), WorkShare(1, 2)):
            with pytest.raises(LockedError, match="part 1/2"), writing(root, other):
                pass
    with writing(root, WorkShare(3, 4)):
        pass


def test_what_is_shared_is_waited_for_and_told_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL", 0.0)
    told = []
    first = holding(root, "calibration")
    first.__enter__()

    def waiting() -> None:
        told.append("waits")
        first.__exit__(None, None, None)

    with holding(root, "calibration", waiting):
        assert told == ["waits"]


def test_an_object_whose_owner_is_gone_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    root = to_path(f"memory://{uuid.uuid4().hex}")
    claim = {"id": "x", "host": "elsewhere", "pid": 1}
    path = root / lock.FOLDER / "part-1-of-1"
    put_bytes(path, json.dumps({**claim, "time": lock.time.time()}).encode())
    with pytest.raises(LockedError), writing(root):
        pass
    put_bytes(path, json.dumps({**claim, "time": lock.time.time() - lock.STALE - 1}).encode())
    with writing(root):
        pass
    put_bytes(path, json.dumps({**claim, "host": lock.socket.gethostname(), "time": lock.time.time()}).encode())
    monkeypatch.setattr(lock, "_process_lives", lambda pid: False)
    with writing(root):
        pass
    assert file_sizes(root) == {}, "nothing is left behind"


def test_file_systems_say_whether_they_can_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_lock(root)
    remote = to_path(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(lock, "create_exclusively", lambda path, data: True)
    assert not can_lock(remote), "a store that ignores the condition"


def test_a_writer_that_fails_leaves_what_others_have_made_or_hold(tmp_path):
    root = tmp_path / "set"
    with writing(root, WorkShare(1, 2)):
        with pytest.raises(KeyError), writing(root, WorkShare(2, 2)):
            raise KeyError
        with pytest.raises(LockedError), writing(root, WorkShare(1, 4)):
            pass
    with pytest.raises(KeyError), writing(root):
        raise KeyError((root / "file").write_text("x"))
    assert (root / "file").read_text() == "x"
    (root / "file").unlink()
    with pytest.raises(KeyError), writing(root):
        raise KeyError
    assert list(root.iterdir()) == [], "the folder was there before"


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    real, calls = fcntl.flock, itertools.count()

    def flock(file, how):
        if next(calls) == 0:  # as by a writer that fails between the two steps
            shutil.rmtree(tmp_path / lock.FOLDER)
        real(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with writing(tmp_path), pytest.raises(LockedError), writing(tmp_path):
        pass
