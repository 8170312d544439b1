"""A local cache of what training reads from a remote target set, of bounded size.

Pieces are kept under the digest of their file, so a cache can serve several sets and never returns outdated data. A
full cache evicts nothing. Every epoch visits all blocks, so a cache that evicted the oldest would have evicted each
block by the time it is needed again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import google_crc32c

from cae2pipe.artifacts.atomic import TEMPORARY
from cae2pipe.artifacts.storage import read_bytes

RECOUNT = 64
"""Pieces that a process adds before it checks again how much others have added."""


class BlockCache:
    """Pieces of files in ``folder``, ``limit`` bytes at most (a few pieces more while several processes fill it)."""

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self._used = 0
        self._added = RECOUNT

    def read(self, digest: str, offset: int, size: int, *, fetch: Callable[[], bytes]) -> bytes:
        """The piece of the file with this SHA-256, from the cache or, and then into it, from ``fetch``."""
        name = hashlib.blake2b(f"{digest} {offset} {size}".encode(), digest_size=20).hexdigest()
        path = self.folder / name[:2] / name
        with suppress(OSError):
            kept = read_bytes(path)
            if google_crc32c.value(kept[:-4]).to_bytes(4, "little") == kept[-4:]:
                return kept[:-4]
            path.unlink()  # damaged, or from a machine that went down
        data = fetch()
        if self._has_room(len(data) + 4):
            self._keep(path, data)
        return data

    def _has_room(self, size: int) -> bool:
        if self._used + size > self.limit:
            return False
        if self._added >= RECOUNT:
            self._used, self._added = folder_bytes(self.folder), 0
        return self._used + size <= self.limit

    def _keep(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data + google_crc32c.value(data).to_bytes(4, "little"))
            temporary.replace(path)
        except OSError:  # a full disk must not stop training
            self._used = self.limit
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._used += len(data) + 4
        self._added += 1


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(base) / name).stat().st_size
    return total
