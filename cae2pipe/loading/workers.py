"""Worker processes that give out items in order."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from cae2pipe.errors import Cae2pipeError, WorkerError
from cae2pipe.processes import prepare_worker

PRELOAD = ["cae2pipe.loading.apart", "cae2pipe.loading.batches", "cae2pipe.targets.rendering"]


def in_order(dataset: Dataset, workers: int) -> Iterator[Any]:
    """The items of a dataset, as they are, made by ``workers`` processes (0: in this one) and given out in order.

    Workers are started from a clean server process: fork would copy a CUDA context or a thread pool half-alive.

    Raises:
        Cae2pipeError: what the dataset raised, as it was. WorkerError: a worker was killed.
    """
    if workers == 0:
        yield from _items(dataset)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with warnings.catch_warnings():
        # More workers than cores is the user's choice, and right where reading waits for a network.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _GuardedStream(dataset) if isinstance(dataset, IterableDataset) else _Guarded(dataset),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=2,
            multiprocessing_context=context,
            worker_init_fn=_prepare,
        )
        iterator = iter(loader)
    while True:
        try:
            item = next(iterator, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise WorkerError(
                "a worker process was killed, perhaps for lack of memory",
                where=str(error).split(".")[0],
                fix="run the same command again with fewer --workers: what is finished is kept",
            ) from None
        if item is None:
            return
        if isinstance(item, Cae2pipeError):
            raise item
        yield item


def _items(dataset: Any) -> Iterator[Any]:
    return iter(dataset) if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(len(dataset)))


class _Guarded(Dataset):
    """A dataset whose errors are items. DataLoader would send a text with a traceback, and lose place and remedy."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Cae2pipeError as error:
            return error


class _GuardedStream(IterableDataset):
    """The same for a stream, which an error ends."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Cae2pipeError as error:
            yield error


def _prepare(worker: int) -> None:
    # torch's own watch over the main process sees the server process only, which outlives it.
    prepare_worker()


def _as_is(item: Any) -> Any:
    return item
