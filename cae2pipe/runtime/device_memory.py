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
        said = str(error).splitlines()[0]
        raise OutOfMemoryError(f"{what} does not fit into the device's memory: {said}", where=where, fix=fix) from None


def free_unused() -> None:
    """Give back to the device what nothing refers to any more, cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
