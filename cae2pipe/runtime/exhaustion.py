"""Failures of the machine, which must never be blamed on what was being read."""

from __future__ import annotations

import errno
import sys
from typing import Any

from cae2pipe.runtime.system_errors import explain_system_error


def reraise_exhaustion(error: Exception) -> None:
    """Raise the error again where memory has run out or a device has failed; else return.

    To be called first wherever errors of many kinds are about to be explained by the data: a device also reports here
    what went wrong in work that was queued earlier.

    Raises:
        StorageError: the process may not open any more files.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise explain_system_error(error) or error from None
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        raise error
    torch: Any = sys.modules.get("torch")  # where it is not loaded, it has raised nothing
    if torch and isinstance(error, RuntimeError):
        # The host's memory has no class of its own in torch.
        own = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
        if own or "DefaultCPUAllocator" in str(error):
            raise error
