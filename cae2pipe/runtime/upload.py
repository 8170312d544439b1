"""Uploading items with tensors to a device: pinned by threads, and copied on a separate stream while the previous item
is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from cae2pipe.runtime.threads import in_threads


class Tensors(Protocol):
    """A batch or chunk: something that holds tensors."""

    def map(self, change: Callable[[Tensor], Tensor], /) -> Self:
        """The same with every tensor changed."""


S = TypeVar("S")
T = TypeVar("T", bound=Tensors)


def upload_ahead(
    items: Iterable[S], move: Callable[[S], T], device: torch.device, *, stream: torch.cuda.Stream
) -> Iterator[T]:
    """``move(item)`` of every item, done on ``stream`` of ``device``. Each is started before the last one is yielded,
    and used on the stream that is current then.

    Raises:
        torch.OutOfMemoryError: the device has no memory for two of them.
    """

    def begun(item: S) -> tuple[T, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            moved = move(item)
        done = torch.cuda.Event()
        done.record(stream)
        return moved, done

    def ready(moved: T, done: torch.cuda.Event) -> T:
        current = torch.cuda.current_stream(device)
        current.wait_event(done)

        def used_here(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)
            return tensor

        return moved.map(used_here)

    waiting: tuple[T, torch.cuda.Event] | None = None
    for item in items:
        following = begun(item)
        if waiting:
            yield ready(*waiting)
        waiting = following
    if waiting:
        yield ready(*waiting)


def pinned(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """The items; for CUDA in pinned memory, to which threads copy some of them ahead of their use."""
    if device.type != "cuda":
        yield from items
        return

    def pin(item: T) -> T:
        return item.map(lambda tensor: tensor.pin_memory())

    with closing(in_threads(pin, ((item,) for item in items), 2, most=3)) as ready:
        yield from ready


def upload_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream to upload on; None if the device needs none. Code that uploads often should reuse its stream: the
    allocator keeps memory for each stream that it has seen."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def uploaded(items: Iterable[T], device: torch.device, stream: torch.cuda.Stream | None = None) -> Iterator[T]:
    """The items on the device. For CUDA, each is copied on a stream that starts before the last one is yielded.

    Args:
        stream: from ``upload_stream``; None: a new one.

    Raises:
        torch.OutOfMemoryError: the device has no memory for two of them.
    """
    stream = stream or upload_stream(device)
    if stream is None:
        yield from items
        return

    def move(item: T) -> T:
        return item.map(lambda tensor: tensor.to(device, non_blocking=True))

    yield from upload_ahead(items, move, device, stream=stream)
