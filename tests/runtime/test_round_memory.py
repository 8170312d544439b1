"""Memory that the workers of a round share: used again, but never while an item that lies in it is in use."""

from __future__ import annotations

import errno
import gc
import os
import platform
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path

import pytest
import torch

from cae2pipe.errors import WorkerError
from cae2pipe.loading.batches import joined_tensors
from cae2pipe.runtime import shared_memory, workers
from cae2pipe.runtime.shared_memory import PREFETCH, SHM, RoundArray, RoundMemory, round_bytes, round_parts
from cae2pipe.runtime.workers import in_order

ARRAYS = {
    "across": RoundArray((30, 12, 100), "<i4", 1),
    "none": RoundArray((0, 12), "<i8", 1),
    "along": RoundArray((12, 50), "<u2"),
}
ROOM = round_bytes(ARRAYS)


@dataclass(frozen=True)
class Rounds:
    """Each worker's samples of ``count`` rounds, full of the round's number, and a tensor in memory of its own."""

    count: int

    def share(self, worker: int, workers: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        own = range(12 * worker // workers, 12 * (worker + 1) // workers)
        for number in range(self.count):
            parts = round_parts(ARRAYS, own)
            for name, array in ARRAYS.items():
                assert parts[name].shape[array.axis] == len(own)
                parts[name].fill_(number)
            parts["along"][:, 0] = torch.arange(own.start, own.stop)
            yield parts, torch.full((3,), number)


def joined(items: list[tuple[dict[str, torch.Tensor], torch.Tensor]], name: str) -> torch.Tensor:
    return joined_tensors([parts[name] for parts, _ in items], ARRAYS[name].axis)


def rounds(count: int, workers: int) -> Iterator[list[tuple[dict[str, torch.Tensor], torch.Tensor]]]:
    items = in_order(Rounds(count), workers, room=ROOM)
    while step := [item for _, item in zip(range(workers), items, strict=False)]:
        yield step
        del step


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_parts_of_workers_are_one_array_and_its_memory_is_used_again(workers):
    kept, places = {}, set()
    for number, items in enumerate(rounds(40, workers)):
        whole, along = joined(items, "across"), joined(items, "along")
        assert (tuple(whole.shape), whole.dtype) == ((30, 12, 100), torch.int32)
        assert whole.untyped_storage().data_ptr() == items[0][0]["across"].untyped_storage().data_ptr()
        assert joined(items, "none").shape == (0, 12)
        assert along[:, 0].tolist() == list(range(12))
        assert (along[:, 1:] == number).all()
        assert all((own == number).all() for _, own in items)
        places.add(whole.data_ptr())
        if number in (3, 4, 17):
            kept[number] = whole[:, 7:9]
        del items, whole, along
    for number, tensor in kept.items():
        assert (tensor == number).all()
    # Three that are kept, what is made ahead, what has been received, and what was received before.
    assert PREFETCH < len(places) <= 3 + PREFETCH + 2


def test_what_is_kept_whole_is_new_memory_each_time():
    kept = list(rounds(12, 2))
    assert [int(items[1][0]["across"][0, 0, 0]) for items in kept] == list(range(12))
    assert len({items[0][0]["across"].data_ptr() for items in kept}) == 12


def test_rounds_that_are_open_have_memory_of_their_own():
    memory = RoundMemory(ROOM)
    assert [memory.number(turn) for turn in (0, 1, 0, 2)] == [0, 1, 0, 2]
    tensor = torch.empty(0, dtype=torch.uint8).set_(memory.storage(1))
    assert (len(tensor), memory.storage(1).data_ptr()) == (ROOM, tensor.data_ptr())
    for turn in (1, 2):
        memory.complete(turn)
    assert memory.number(3) == 2  # 0 is not complete, and 1 in use
    del tensor
    assert [memory.number(turn) for turn in (4, 5)] == [1, 3]
    memory.close()
    assert open_memories() == 0  # though `memory` remains, as in the traceback of an error


def open_memories() -> int:
    """Files of shared memory that this process has open, or mapped with a descriptor."""
    links = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return sum(link.is_relative_to(SHM) and "#" in link.name for link in links)


def test_memory_is_given_back_when_the_last_tensor_is_gone():
    items = rounds(40, 2)
    first = next(items)
    items.close()
    assert (first[0][0]["across"] == 0).all()
    assert open_memories() > 0
    del first
    gc.collect()
    assert open_memories() == 0


def test_too_little_shared_memory_is_told_before_any_is_taken(monkeypatch):
    monkeypatch.setattr(shared_memory, "shm_size", lambda: 5 * ROOM - 1)
    with pytest.raises(WorkerError, match=r": 2 may have .* in transit there"):
        next(in_order(Rounds(3), 2, room=ROOM))


def test_a_memory_that_does_not_fit_is_an_error_with_a_remedy(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WorkerError, match=r"does not fit into /dev/shm.*No space left") as caught:
        next(in_order(Rounds(3), 2, room=ROOM))
    assert "--shm-size" in str(caught.value.fix)


class LikeMacOS(Rounds):
    """Rounds whose workers acknowledge descriptors, as multiprocessing does on macOS."""

    def __setstate__(self, state: dict[str, int]) -> None:
        reduction.ACKNOWLEDGE = True
        self.__dict__.update(state)


def test_workers_get_memory_while_they_send_items_even_on_macos(monkeypatch):
    start = workers._start

    def started(*args: object, **named: object) -> None:
        start(*args, **named)
        # Not before: the server of processes, which began earlier, does not acknowledge.
        monkeypatch.setattr(reduction, "ACKNOWLEDGE", True)

    monkeypatch.setattr(workers, "_start", started)
    kept = [parts["along"] for parts, _ in in_order(LikeMacOS(12), 2, room=ROOM)]
    assert [int(along[0, 1]) for along in kept] == [number // 2 for number in range(24)]


class Exhausted:
    """Numbers from a worker that may open no more files once it has made the first."""

    def share(self, worker: int, workers: int) -> Iterator[int]:
        for number in range(3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            yield number


def test_a_worker_that_cannot_open_its_memory_says_why():
    items = in_order(Exhausted(), 1, room=ROOM)
    assert next(items) == 0
    with pytest.raises(OSError, match="Too many open files"):
        next(items)


def test_a_descriptor_that_cannot_be_sent_is_an_error_and_not_waited_for(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    monkeypatch.setattr(socket, "send_fds", full)
    with pytest.raises(OSError, match="Too many references"):
        next(in_order(Rounds(3), 1, room=ROOM))


class Passing:
    """How many new pages each of five items took, which make four large arrays and free them."""

    def share(self, worker: int, workers: int) -> Iterator[int]:
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            arrays = [b"x" * (15 * 2**20) for _ in range(4)]
            del arrays
            yield resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is a setting of glibc")
def test_a_worker_uses_freed_memory_again():
    first, *_, last = in_order(Passing(), 1, room=ROOM)
    assert last < first / 10


def test_outside_of_a_worker_memory_is_ordinary():
    parts = round_parts(ARRAYS, range(3, 5))
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "across": (30, 2, 100),
        "none": (0, 2),
        "along": (2, 50),
    }
    assert parts["along"].dtype == torch.int16
    assert not parts["along"].is_shared()
