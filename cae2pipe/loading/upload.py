"""Copies to a CUDA device on a stream of their own, each begun while the one before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Tensors(Protocol):
    """A batch or chunk: something that holds tensors."""

    def map(self, change: Callable[[Tensor], Tensor], /) -> Self:
        """The same with every tensor changed."""


S = TypeVar("S")
T = TypeVar("T", bound=Tensors)


def upload_ahead(
    items: Iterable[S], move: Callable[[S], T], device: torch.device, stream: torch.cuda.Stream
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
