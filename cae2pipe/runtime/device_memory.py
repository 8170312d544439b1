"""The end of a device's memory, wherever it is met, and giving back what is no longer used."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cae2pipe.errors import OutOfMemoryError


@contextmanager
def memory_advice(what: str, fix: str, where: object = None) -> Iterator[None]:
    """Around work on a device: the end of its memory becomes an error that says what to change.

    Raises:
        OutOfMemoryError: ``what`` (a noun and its number, as "a chunk of 64 images") did not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(what, str(error), fix, where=where) from None


def out_of_memory(what: str, reason: str, fix: str, *, where: object = None) -> OutOfMemoryError:
    """The error for ``what`` did not fit; ``reason`` is what torch said, of which the first line is told."""
    said = reason.splitlines()[0]
    return OutOfMemoryError(f"{what} does not fit into the device's memory: {said}", where=where, fix=fix)


def free_unused() -> None:
    """Give back to the device what nothing refers to any more, cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
