"""Tensor work in threads: tasks run ahead of the caller, results come in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from cae2pipe.runtime.processes import ahead

T = TypeVar("T")


def in_threads(
    function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], threads: int, *, most: int
) -> Generator[T, None, None]:
    """``function(*task)`` of every task, in order, with up to ``most`` started and not yet yielded.

    Each thread computes alone. Otherwise each would start a team of OpenMP threads, and the teams would compete for
    the cores; and the last bits of some results would depend on the number of cores.
    """
    with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from ahead(pool, function, tasks, most=most)
