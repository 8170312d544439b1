"""Shared memory of items in transit from workers to the main process, and whether there is enough.

Tensors travel in files of /dev/shm, which exist only in memory. Docker gives a container 64 MB of it by default, less
than one batch of most presets.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cae2pipe.errors import WorkerError
from cae2pipe.runtime.progress import gigabytes
from cae2pipe.runtime.ranks import torchrun_rank

SHM = Path("/dev/shm")
PREFETCH = 2
"""Items per worker that may be finished or in progress before the main process takes the first."""
HELD = 3
"""Items per worker that the main process may hold: threads copy two into pinned memory, and one has been received."""
ALIGNMENT = 4096


@dataclass(frozen=True)
class RoundArray:
    """An array over samples to which every worker adds its own in a round: shape of the whole array, numpy type (uint16
    is held as int16), and which axis runs over samples."""

    shape: tuple[int, ...]
    dtype: str
    axis: int = 0

    @property
    def kind(self) -> np.dtype[Any]:
        return np.dtype("<i2" if self.dtype == "<u2" else self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.kind.itemsize


def round_bytes(arrays: Mapping[str, RoundArray]) -> int:
    """Bytes of memory for all arrays of a round."""
    return sum(_aligned(array.nbytes) for array in arrays.values())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


_memory: list[Tensor] = []
"""In a worker whose items share memory: that of the round in progress, uint8."""


def use_memory(memory: Tensor) -> None:
    """Say in which memory this worker makes its next item."""
    _memory[:] = [memory]


def in_round(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is the memory of the round in progress."""
    return bool(_memory) and storage.data_ptr() == _memory[0].data_ptr()


def round_parts(arrays: Mapping[str, RoundArray], own: range) -> dict[str, Tensor]:
    """This process's samples of each array, of undefined values: in a worker as parts of the arrays that all workers
    fill, so that nothing is copied to hand them over or to join them. Elsewhere in memory of their own.

    Args:
        own: which samples of the round.
    """
    parts, offset = {}, 0
    for name, array in arrays.items():
        if _memory:
            flat = _memory[0][offset : offset + array.nbytes]
            whole = flat.view(torch.from_numpy(np.empty(0, dtype=array.kind)).dtype).view(array.shape)
            parts[name] = whole.narrow(array.axis, own.start, len(own))
            offset += _aligned(array.nbytes)
        else:
            shape = (*array.shape[: array.axis], len(own), *array.shape[array.axis + 1 :])
            parts[name] = torch.from_numpy(np.empty(shape, dtype=array.kind))
    return parts


class RoundMemory:
    """Shared memory for the items of all workers in a round. It is used again for a later round once this process has
    no tensor in it: new memory must be cleared by the system first, which takes longer than filling it.

    Args:
        size: bytes per round.
    """

    def __init__(self, size: int):
        self.size = size
        self._files: list[IO[bytes]] = []
        self._whole: list[np.ndarray] = []
        self._users: list[StorageWeakRef] = []
        self._open: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def number(self, turn: int) -> int:
        """The number of the memory of round ``turn``: as many as were in use before, if it is new.

        Raises:
            WorkerError, OSError: there is not enough shared memory.
        """
        if turn not in self._open:
            free = (number for number, user in enumerate(self._users) if user.expired())
            number = next(free, len(self._whole))
            if number == len(self._whole):
                self._add()
            # A storage of this round's own, which shows whether its tensors are still in use.
            storage = torch.from_numpy(self._whole[number]).untyped_storage()
            self._users[number:] = [StorageWeakRef(storage), *self._users[number + 1 :]]
            self._open[turn] = (number, storage)
        return self._open[turn][0]

    def _add(self) -> None:
        # Closed by `close`: workers get it whenever they first need it.
        file = tempfile.TemporaryFile(dir=SHM if SHM.is_dir() else None)  # noqa: SIM115
        self._files.append(file)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            else:  # macOS
                file.truncate(self.size)
            self._whole.append(mapped(file.fileno()))
        except OSError as error:
            raise explain_sharing(error, self.size) from error

    def file(self, number: int) -> int:
        """The descriptor of a memory's file."""
        return self._files[number].fileno()

    def storage(self, turn: int) -> torch.UntypedStorage:
        """The memory of a round in this process."""
        return self._open[turn][1]

    def complete(self, turn: int) -> None:
        """Say that all items of a round have been received."""
        del self._open[turn]

    def close(self) -> None:
        """Close the files. What is in use stays until it is used no longer; a traceback that keeps this object keeps no
        memory."""
        for file in self._files:
            file.close()
        self._whole.clear()
        self._users.clear()
        self._open.clear()


def mapped(file: int) -> np.ndarray:
    """The content of a file of shared memory, uint8."""
    return np.frombuffer(mmap.mmap(file, 0), dtype=np.uint8)


def bytes_under_way(item: int, workers: int, items: int | None = None) -> int:
    """Largest number of bytes of shared memory in use, if each item takes ``item`` bytes: the items that workers make
    ahead, and those that the main process holds. ``items``: their total number, if known."""
    most = (PREFETCH + HELD) * workers
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
