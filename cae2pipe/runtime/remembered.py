"""Items that are read repeatedly, kept in memory if all of them fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Memory:
    """A number of bytes that several ``Remembered`` share."""

    def __init__(self, limit: int):
        self.left = limit


class Remembered(Generic[T]):
    """Iterates over ``read()``. A complete first iteration keeps the items, unless they exceed the memory: then every
    iteration reads them again.

    Args:
        read: begins to read. size: bytes of an item.
    """

    def __init__(self, read: Callable[[], Iterator[T]], size: Callable[[T], int], memory: Memory):
        self.read, self.size, self.memory = read, size, memory
        self.kept: list[T] | None = None
        self.fits = True

    def __iter__(self) -> Iterator[T]:
        if self.kept is not None:
            yield from self.kept
            return
        items: list[T] = []
        used = 0
        for item in self.read():
            yield item
            if self.fits:
                used += self.size(item)
                self.fits = used <= self.memory.left
                if self.fits:
                    items.append(item)
                else:
                    items.clear()
        if self.fits:
            self.kept = items
            self.memory.left -= used
