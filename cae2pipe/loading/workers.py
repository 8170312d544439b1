"""Worker processes that give out items in order."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from cae2pipe.processes import prepare_worker

PRELOAD = ["cae2pipe.loading.batches", "cae2pipe.targets.rendering"]


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
            worker_init_fn=_prepare,
        )
        return iter(loader)


def _prepare(worker: int) -> None:
    # torch's own watch over the main process sees the server process only, which outlives it.
    prepare_worker()


def _as_is(item: Any) -> Any:
    return item
