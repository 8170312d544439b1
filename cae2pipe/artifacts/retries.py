"""Calls of remote file systems: retried on transient errors, and their errors in words."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cae2pipe.errors import BadInputError, StorageError

T = TypeVar("T")

WAITS = (0.2, 1.0, 3.0, 10.0)
"""Seconds before each retry of a remote call."""

PASSING = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, errno.EAGAIN}
"""The errors that fsspec's file systems raise for 500, 503, SlowDown and broken connections."""


def remotely(path: Path, call: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """The call's result, retried on transient errors.

    Raises:
        FileNotFoundError, FileExistsError: as they are; callers know what they mean.
        BadInputError: wrong or missing credentials. StorageError: everything else.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, NotImplementedError, TypeError, ValueError, MemoryError):
            raise
        except Exception as error:  # every file system has its own error classes
            if wait is None or not may_pass(error):
                raise explain(path, error) from None
            sleep(wait)
    raise AssertionError


def may_pass(error: Exception) -> bool:
    """Whether an error is transient: timeouts, refused or broken connections, 500, 503."""
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if any(word in type(error).__name__ for word in ("Timeout", "Connect", "HTTPClient", "IncompleteRead")):
        return True
    return isinstance(error, OSError) and error.errno in PASSING


def explain(path: Path, error: Exception) -> StorageError | BadInputError:
    """What a remote file system's error means to the user."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, PermissionError) or "Credentials" in kind:
        return BadInputError(
            f"the storage refuses access: {text or kind}",
            where=path,
            fix="check the credentials (for s3://: AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and "
            "their permissions",
        )
    if may_pass(error):
        return StorageError(
            f"the storage did not answer in {len(WAITS) + 1} tries: {text or kind}",
            where=path,
            fix="run the same command again when it does; finished work is kept",
        )
    return StorageError(f"the storage failed: {kind}: {text}", where=path, fix="check the URL and the storage")
