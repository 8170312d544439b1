"""Items with tensors on their way to a device: pinned by threads, carried over while the one before is worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import torch

from cae2pipe.loading.upload import Tensors, upload_ahead
from cae2pipe.threads import in_threads

T = TypeVar("T", bound=Tensors)


def pinned(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """The items; those that are to go to CUDA in pinned memory, where threads bring some of them ahead of their use."""
    if device.type != "cuda":
        yield from items
        return

    def pin(item: T) -> T:
        return item.map(lambda tensor: tensor.pin_memory())

    with closing(in_threads(pin, ((item,) for item in items), 2, 3)) as ready:
        yield from ready


def upload_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream to upload on; None where it needs none. One that uploads often keeps its own: the allocator keeps memory
    for each stream that it has seen."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def uploaded(items: Iterable[T], device: torch.device, stream: torch.cuda.Stream | None = None) -> Iterator[T]:
    """The items on the device. To CUDA a stream carries each, on its way before the last one is given out.

    Args:
        stream: from ``upload_stream``; None: one is made.

    Raises:
        torch.OutOfMemoryError: the device has no room for two of them.
    """
    stream = stream or upload_stream(device)
    if stream is None:
        yield from items
        return

    def move(item: T) -> T:
        return item.map(lambda tensor: tensor.to(device, non_blocking=True))

    yield from upload_ahead(items, move, device, stream)
