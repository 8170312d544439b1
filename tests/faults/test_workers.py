"""Workers that die, cannot send an item, or never send it: whoever waits for the item gets an error."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from cae2pipe.errors import Terminated, WorkerError
from cae2pipe.runtime import shared_memory, workers
from cae2pipe.runtime.shared_memory import bytes_under_way
from cae2pipe.runtime.signals import StoppedWaitingError, deferred_stop, until_stopped
from cae2pipe.runtime.workers import in_order


class Six(Dataset):
    def __len__(self) -> int:
        return 6


class Deadly(Six):
    """The third item kills the worker."""

    def __getitem__(self, index: int) -> int:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


class Large(Six):
    """Items that fill the pipe."""

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return os.getpid(), bytes(10**7)


class Unsendable(Six):
    def __getitem__(self, index: int) -> object:
        return index if index < 3 else threading.Lock()


class Shared(Six):
    """Tensors of a megabyte, with a limit of ``most`` bytes for files and so for shared memory."""

    def __init__(self, most: int):
        self.most = most

    def __getitem__(self, index: int) -> torch.Tensor:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, hard))
        return torch.full((2**20,), index, dtype=torch.uint8)


class Missing(Six):
    """Items that raise the operating system's error for a missing file."""

    def __getitem__(self, index: int) -> bytes:
        return Path("nowhere").read_bytes()


class Stuck(Six):
    """Items that come too late."""

    def __getitem__(self, index: int) -> int:
        threading.Event().wait(20)
        return index


def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with pytest.raises(
        WorkerError, match="worker process was killed by SIGKILL, perhaps because memory ran out"
    ) as caught:
        list(in_order(Deadly(), 1))
    assert "fewer --workers" in str(caught.value.fix)


def test_a_worker_that_is_killed_in_the_middle_of_sending_is_noticed() -> None:
    items = in_order(Large(), 1)
    pid, _ = next(items)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="was killed"):
        list(items)


def test_an_item_that_cannot_be_sent_takes_its_place() -> None:
    items = in_order(Unsendable(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TypeError, match="cannot pickle"):
        next(items)


def test_tensors_that_find_no_place_in_shared_memory_are_an_error_with_a_remedy() -> None:
    with pytest.raises(WorkerError, match=r"an item of 1\.05 MB does not fit into /dev/shm.*too large") as caught:
        list(in_order(Shared(1000), 2))
    assert "docker run --shm-size=1g" in str(caught.value.fix)
    assert [int(item[0]) for item in in_order(Shared(2**30), 2)] == [0, 1, 2, 3, 4, 5]


def test_too_little_shared_memory_is_told_before_the_first_item(monkeypatch) -> None:
    assert bytes_under_way(2**20, workers=2, items=5) == 5 * 2**20
    assert bytes_under_way(100, workers=2) == 1000
    monkeypatch.setattr(shared_memory, "shm_size", lambda: 5 * 2**20)
    with pytest.raises(WorkerError, match=r": 2 may have 6\.29 MB in transit there, but its size is 5\.24 MB"):
        next(in_order(Shared(2**30), 2))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorkerError, match=r": 2 may have 10\.5 MB"):
        next(in_order(Shared(2**30), 1))
    monkeypatch.undo()
    monkeypatch.setattr(shared_memory, "shm_size", lambda: 5 * 2**20)
    assert len(list(in_order(Shared(2**30), 1))) == 6


def test_what_the_operating_system_said_comes_whole() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        list(in_order(Missing(), 1))
    assert caught.value.filename == "nowhere"


def test_one_signal_ends_waiting_for_an_item(monkeypatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.0)

    def train() -> None:
        with deferred_stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            # The loop of a training first saves the steps done so far; elsewhere, as in scoring, nothing is saved.
            assert list(until_stopped(in_order(Stuck(), 2), stop)) == []
            list(in_order(Stuck(), 1))

    with pytest.raises(Terminated):
        train()


def test_a_worker_that_stands_still_does_not_hold_up_a_stop() -> None:
    """Even during the transfer of a message, while the main process fetches its shared memory."""
    items = in_order(Shared(2**30), 2)
    assert int(next(items)[0]) == 0
    before = multiprocessing.active_children()
    for child in before:
        os.kill(child.pid, signal.SIGSTOP)
    with deferred_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedWaitingError):
            list(items)
    assert len(before) == 2
    assert not any(child.is_alive() for child in before)


def test_a_script_without_a_main_guard_is_told_so(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from cae2pipe.runtime.workers import in_order\nlist(in_order([1, 2], 1))\n")
    # Too long for a socket's name, as on some clusters: workers start anyway.
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "AF_UNIX" not in done.stderr
    # By the worker, and by the main process.
    assert "put the calls below `if __name__" in done.stderr
    assert "a script that uses workers needs `if __name__" in done.stderr
