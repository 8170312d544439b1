"""Tensor work in threads: some tasks ahead of the caller, results in order."""

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
    """``function(*task)`` of every task, in order, with up to ``most`` begun and not yet given out.

    Each thread computes alone. Otherwise it would bring a team of OpenMP threads along, and the teams would fight for
    the cores; and some results would depend, in their last bits, on how many cores there are.
    """
    with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from ahead(pool, function, tasks, most=most)
