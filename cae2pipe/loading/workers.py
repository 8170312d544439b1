"""Worker processes that give out items in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

PRELOAD = ["cae2pipe.loading.batches", "cae2pipe.targets.rendering"]


def worker_count(setting: int, most: int | None = None) -> int:
    """Processes for a ``workers`` setting: -1 is one a core, at most ``most``."""
    if setting >= 0:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, most or cores)


def in_order(dataset: Dataset, workers: int) -> Iterator[Any]:
    """The items of a dataset, as they are, made by ``workers`` processes and given out in order.

    Workers are started from a clean server process: fork would copy a CUDA context or a thread pool half-alive.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with warnings.catch_warnings():
        # More workers than cores is the user's choice, and right where reading waits for a network.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=2,
            multiprocessing_context=context,
            worker_init_fn=_leave_interrupts_to_the_main_process,
        )
        return iter(loader)


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    # Ctrl-C reaches the whole process group: a worker that dies of it looks like a failure. SIGTERM stays as it is:
    # it is how an interpreter that exits ends workers that are left.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_is(item: Any) -> Any:
    return item
