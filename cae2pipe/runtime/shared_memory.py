"""Shared memory of items in transit from workers to the main process, and whether there is enough.

Tensors travel in files of /dev/shm, which exist only in memory. Docker gives a container 64 MB of it by default, less
than one batch of most presets.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import WorkerError
from cae2pipe.runtime.progress import gigabytes
from cae2pipe.runtime.ranks import torchrun_rank

SHM = Path("/dev/shm")
PREFETCH = 2
"""Items per worker that may be finished or in progress before the main process takes the first."""


class SharedPool:
    """Shared memory of a worker that is used again for later items: new memory must be cleared by the system first,
    which takes longer than filling it.

    The main process says which pieces it no longer uses. A piece that it keeps is never used again.
    """

    def __init__(self) -> None:
        self._pieces: list[torch.UntypedStorage] = []
        self._free: dict[int, list[int]] = {}
        self._taken: list[int] = []

    def take(self, size: int) -> torch.UntypedStorage:
        """A piece of ``size`` bytes for the next item. Raises RuntimeError if there is not enough shared memory."""
        if self._free.get(size):
            number = self._free[size].pop()
        else:
            number = len(self._pieces)
            self._pieces.append(torch.UntypedStorage._new_shared(size, device="cpu"))
        self._taken.append(number)
        return self._pieces[number]

    def used(self) -> list[int]:
        """Numbers of the pieces that were taken since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def free(self, numbers: Sequence[int]) -> None:
        """Say that pieces may be taken again."""
        for number in numbers:
            self._free.setdefault(self._pieces[number].nbytes(), []).append(number)

    def pointers(self) -> dict[int, int]:
        """Numbers of the pieces that were taken since the last ``used``, by their address."""
        return {self._pieces[number].data_ptr(): number for number in self._taken}


_pools: list[SharedPool] = []


def enter_worker() -> SharedPool:
    """Say that this process hands its items to another one, and get the pool that ``shared_empty`` then uses."""
    _pools[:] = [SharedPool()]
    return _pools[0]


def shared_empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor of undefined values, for a numpy type; uint16 as int16. In a worker it lies in shared memory, so that
    handing it over copies nothing.

    Raises:
        WorkerError, OSError: there is not enough shared memory.
    """
    kind = np.dtype("<i2" if dtype == "<u2" else dtype)
    size = math.prod(shape) * kind.itemsize
    if not _pools or not size:
        return torch.from_numpy(np.empty(shape, dtype=kind))
    try:
        storage = _pools[0].take(size)
    except RuntimeError as error:
        raise explain_sharing(error, size) from error
    flat: Tensor = torch.empty(0, dtype=torch.from_numpy(np.empty(0, dtype=kind)).dtype).set_(storage)
    return flat.view(shape)


def bytes_under_way(item: int, workers: int, items: int | None = None) -> int:
    """Largest number of bytes of shared memory in use, if each item takes ``item`` bytes: the items that workers make
    ahead, and those that the main process works on. ``items``: their total number, if known."""
    most = (PREFETCH + 2) * workers
    return item * (most if items is None else min(most, items))


def shm_size() -> int | None:
    """Size of /dev/shm in bytes; None if there is no such folder, as on macOS, and therefore no such limit."""
    try:
        return shutil.disk_usage(SHM).total
    except OSError:
        return None


def check_room(item: int, workers: int, items: int | None = None) -> None:
    """Refuse to start work that would run out of shared memory. All processes of torchrun share it.

    Raises:
        WorkerError: /dev/shm is smaller than the items in transit.
    """
    processes = torchrun_rank().on_machine
    needed, size = processes * bytes_under_way(item, workers, items), shm_size()
    if size is not None and needed > size:
        raise WorkerError(
            f"workers pass items of {gigabytes(item)} through {SHM}: {processes * workers} may have "
            f"{gigabytes(needed)} in transit there, but its size is {gigabytes(size)}",
            where=SHM,
            fix=shm_remedy(needed),
        )


def shm_remedy(needed: int = 0) -> str:
    """The fix for too little shared memory; ``needed``: bytes."""
    size = max(1, -(-needed * 5 // 4 // 2**30))
    return (
        f"enlarge it: `docker run --shm-size={size}g` or `--ipc=host`; without Docker `mount -o remount,size={size}g "
        f"{SHM}`; or use fewer --workers (--workers 0 needs none) or a smaller batch"
    )


def explain_sharing(error: Exception, item: int) -> Exception:
    """The error to raise instead of one that occurred while an item of ``item`` bytes was put into shared memory."""
    # torch puts the errno at the end of its text.
    match = re.search(r"\((\d+)\)\s*$", str(error).splitlines()[0] if str(error) else "")
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return OSError(number, os.strerror(number))
    if number is None:
        return error
    size = shm_size()
    holds = "" if size is None else f", whose size is {gigabytes(size)}"
    return WorkerError(
        f"an item of {gigabytes(item)} does not fit into {SHM}{holds}: {os.strerror(number)}",
        where=SHM,
        fix=shm_remedy(item),
    )
