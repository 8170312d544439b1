"""Items with tensors on their way to a device: pinned by threads, carried over by a stream of their own while the one
before is worked on."""

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
    """``move(item)`` of every item, done on ``stream`` of ``device``. Each is begun before the last one is given
    out, to be used on the stream that is current then.

    Raises:
        torch.OutOfMemoryError: the device has no room for two of them.
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
    """The items; those that are to go to CUDA in pinned memory, where threads bring some of them ahead of their use."""
    if device.type != "cuda":
        yield from items
        return

    def pin(item: T) -> T:
        return item.map(lambda tensor: tensor.pin_memory())

    with closing(in_threads(pin, ((item,) for item in items), 2, most=3)) as ready:
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

    yield from upload_ahead(items, move, device, stream=stream)
