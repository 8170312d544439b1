"""Running out of a device's memory, and freeing what is no longer used."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cae2pipe.errors import OutOfMemoryError


@contextmanager
def memory_advice(what: str, fix: str, where: object = None) -> Iterator[None]:
    """Turns running out of a device's memory, inside the block, into an error that says what to change.

    Raises:
        OutOfMemoryError: ``what`` (such as "a chunk of 64 images") did not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(what, str(error), fix, where=where) from None


def out_of_memory(what: str, reason: str, fix: str, *, where: object = None) -> OutOfMemoryError:
    """The error for ``what`` that did not fit; the first line of ``reason``, torch's message, is quoted."""
    said = reason.splitlines()[0]
    return OutOfMemoryError(f"{what} does not fit into the device's memory: {said}", where=where, fix=fix)


def free_unused() -> None:
    """Free device memory that nothing refers to any more, reference cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
