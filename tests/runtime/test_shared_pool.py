"""Shared memory that workers use again: never while an item that lies in it is in use."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import pytest
import torch

from cae2pipe.runtime.shared_memory import SharedPool, shared_empty
from cae2pipe.runtime.workers import in_order


@dataclass(frozen=True)
class Numbered:
    """Items of two tensors full of their number, one of them in a view of half of its memory."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole, other = shared_empty((100, 100), "<i4"), shared_empty((50,), "<f2")
        shared_empty((7, 7), "|u1")  # taken, and not handed over
        whole.fill_(number)
        other.fill_(number)
        return whole[50:].T, other


def file_of(tensor: torch.Tensor) -> int:
    """The file of shared memory that a tensor lies in."""
    return os.fstat(tensor.untyped_storage()._share_fd_cpu_()[0]).st_ino


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_is_used_again_and_what_is_kept_stays(workers):
    kept, files = {}, set()
    for number, (whole, other) in enumerate(in_order(Numbered(40), workers)):
        assert whole.shape == (100, 50)
        files.add(file_of(whole))
        if number in (3, 4, 17):
            kept[number] = whole[:, 7:9]
            del whole
        assert (other == number).all()
    for number, tensor in kept.items():
        assert (tensor == number).all()
    # Three that are kept, and for each worker what it has made ahead and what is in use.
    assert len(files) <= 3 + 4 * workers


def test_what_is_kept_whole_is_new_memory_each_time():
    items = list(in_order(Numbered(12), 2))
    assert [int(whole[0, 0]) for whole, _ in items] == list(range(12))
    assert len({file_of(whole) for whole, _ in items}) == 12


def test_a_pool_gives_the_sizes_that_are_asked_for():
    pool = SharedPool()
    first, second = pool.take(64), pool.take(128)
    assert (first.nbytes(), second.nbytes()) == (64, 128)
    assert pool.pointers() == {first.data_ptr(): 0, second.data_ptr(): 1}
    assert pool.used() == [0, 1]
    assert pool.pointers() == {}
    pool.free([1])
    assert pool.take(64).data_ptr() != first.data_ptr()
    assert pool.take(128).data_ptr() == second.data_ptr()
    assert pool.used() == [2, 1]


def test_outside_of_a_worker_memory_is_ordinary():
    gc.collect()
    tensor = shared_empty((3, 2), "<u2")
    assert (tensor.dtype, tuple(tensor.shape), tensor.is_shared()) == (torch.int16, (3, 2), False)
