"""Whether files are as the manifest says."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from cae2pipe.artifacts.digest import sha256_file
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import file_size, file_sizes, is_local
from cae2pipe.errors import DamageError

MISSING = "a file that the manifest lists is missing"
CHANGED = "the file's content has changed: its SHA-256 differs from the manifest's"


def presence(root: Path, listed: Mapping[str, int] | None = None) -> Callable[[Mapping[str, FileEntry]], bool]:
    """A function that says whether files of a folder are there, with the sizes of their entries.

    A remote folder is listed once, now. Local files are asked for, a million of them in a second: listing would visit
    every folder of every store.

    Args:
        listed: a remote folder's ``file_sizes``, if they are known.
    """
    if not is_local(root):
        sizes = file_sizes(root) if listed is None else listed
        return lambda files: all(sizes.get(path) == entry["bytes"] for path, entry in files.items())
    prefix = f"{root}/"

    def there(files: Mapping[str, FileEntry]) -> bool:
        try:
            for path, entry in files.items():
                status = os.stat(prefix + path)  # noqa: PTH116
                if status.st_size != entry["bytes"] or not stat.S_ISREG(status.st_mode):
                    return False
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return False
        return True

    return there


def check_file(path: Path, entry: FileEntry, *, digests: bool = True) -> DamageError | None:
    size = file_size(path)
    if size is None:
        what = MISSING
    elif size != entry["bytes"]:
        what = f"the file has {size} bytes instead of {entry['bytes']}: truncated or replaced"
    elif digests and sha256_file(path) != entry["sha256"]:
        what = CHANGED
    else:
        return None
    return DamageError(what, where=path)
