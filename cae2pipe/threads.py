"""Tensor work in threads: some tasks ahead of the caller, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def in_threads(
    function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], threads: int, ahead: int
) -> Generator[T, None, None]:
    """``function(*task)`` of every task, in order; ``ahead`` of them are begun before the first result is waited for.

    Each thread computes alone. Otherwise it would bring a team of OpenMP threads along, and the teams would fight for
    the cores; and some results would depend, in their last bits, on how many cores there are.
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(function, *task))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
