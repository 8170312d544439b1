"""Failures of the machine, which must never be reported as damaged data."""

from __future__ import annotations

import errno
import sys
from typing import Any

from cae2pipe.runtime.system_errors import explain_system_error


def reraise_exhaustion(error: Exception) -> None:
    """Raise the error again if memory has run out or a device has failed; otherwise return.

    Call this first wherever errors of many kinds are explained by the data: a device also reports failures of work
    that was queued earlier.

    Raises:
        StorageError: the process may not open any more files.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise explain_system_error(error) or error from None
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        raise error
    torch: Any = sys.modules.get("torch")  # if it is not loaded, it raised nothing
    if torch and isinstance(error, RuntimeError):
        # torch has no error class for the host's memory.
        own = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
        if own or "DefaultCPUAllocator" in str(error):
            raise error
