"""How much shared memory the items take that are under way from workers to the main process, and whether it is there.

Tensors travel in files of /dev/shm that exist in memory alone. Docker gives a container 64 MB of it where nothing else
is asked for, which is less than one batch of most presets.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from cae2pipe.errors import WorkerError
from cae2pipe.runtime.progress import gigabytes
from cae2pipe.runtime.ranks import torchrun_rank

SHM = Path("/dev/shm")
PREFETCH = 2
"""Items that a worker may have made, or be making, before the main process takes the first of them."""


def bytes_under_way(item: int, workers: int, items: int | None = None) -> int:
    """Bytes of shared memory in use at most, where each item takes ``item`` bytes: what the workers have made ahead,
    and as much of each as the main process works on. ``items``: how many there are at all, where that is known."""
    most = (PREFETCH + 1) * workers
    return item * (most if items is None else min(most, items))


def shm_size() -> int | None:
    """Bytes of /dev/shm in all; None where there is no such folder, as on macOS, and so no such limit."""
    try:
        return shutil.disk_usage(SHM).total
    except OSError:
        return None


def check_room(item: int, workers: int, items: int | None = None) -> None:
    """Refuse to begin what must run out of shared memory sooner or later. All processes of torchrun's share it.

    Raises:
        WorkerError: /dev/shm is smaller than what will be under way.
    """
    processes = torchrun_rank().on_machine
    needed, size = processes * bytes_under_way(item, workers, items), shm_size()
    if size is not None and needed > size:
        raise WorkerError(
            f"workers pass items of {gigabytes(item)} through {SHM}: {processes * workers} may have "
            f"{gigabytes(needed)} under way there, and it holds {gigabytes(size)}",
            where=SHM,
            fix=shm_remedy(needed),
        )


def shm_remedy(needed: int = 0) -> str:
    """What to do about too little shared memory, where ``needed`` bytes are."""
    size = max(1, -(-needed * 5 // 4 // 2**30))
    return (
        f"give it more: `docker run --shm-size={size}g` or `--ipc=host`, elsewhere `mount -o remount,size={size}g "
        f"{SHM}`; or use fewer --workers (--workers 0 needs none) or a smaller batch"
    )


def explain_sharing(error: Exception, item: int) -> Exception:
    """What to raise instead of an error that came up while an item of ``item`` bytes was put into shared memory."""
    # torch puts the errno at the end of its text.
    match = re.search(r"\((\d+)\)\s*$", str(error).splitlines()[0] if str(error) else "")
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return OSError(number, os.strerror(number))
    if number is None:
        return error
    size = shm_size()
    holds = "" if size is None else f", which holds {gigabytes(size)}"
    return WorkerError(
        f"an item of {gigabytes(item)} found no place in {SHM}{holds}: {os.strerror(number)}",
        where=SHM,
        fix=shm_remedy(item),
    )
