"""What the operating system's errors mean to a user; the only place for these texts."""

from __future__ import annotations

import errno
import os
import re

from cae2pipe.errors import BadInputError, Cae2pipeError, OutOfMemoryError, StorageError
from cae2pipe.runtime.broken_packages import explain_import
from cae2pipe.runtime.streams import STDOUT

AGAIN = "then run the same command again; finished work is kept"

ASKED = {
    errno.EACCES: "change its permissions (`ls -ld` shows them), or give another path",
    errno.EPERM: "change its permissions (`ls -ld` and `lsattr` show them), or give another path",
    errno.EROFS: "give a path on a file system that can be written",
    errno.EISDIR: "a file is needed here: move the folder away, or give another path",
    errno.ENOTDIR: "a folder is needed here: move the file away, or give another path",
    errno.EEXIST: "move it away, or give another path",
    errno.ENOTEMPTY: "move what it holds away, or give another path",
    errno.ENOENT: "check the path",
    errno.ELOOP: "remove the symbolic links that lead to each other",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EINVAL: "give another path: this file system does not allow that",
    errno.ENODEV: "give the path of a file or folder",
    errno.ENXIO: "give the path of a file or folder",
}
"""Fixes of errors in what the user asked for."""

FAILED = {
    errno.ENOSPC: f"free some space, {AGAIN}",
    errno.EDQUOT: f"free some space, {AGAIN}",
    errno.EFBIG: "raise the limit (ulimit -f), or use a file system that holds larger files",
    errno.EMFILE: "raise the limit (ulimit -n), or use fewer --workers",
    errno.ENFILE: "raise the limit (sysctl fs.file-max), or use fewer --workers",
    errno.EAGAIN: "raise the limit on processes (ulimit -u), or use fewer --workers",
    errno.ENOLCK: "mount the file system with locks (NFS: with lockd running), or use a local folder",
    errno.ENOTSUP: "use a local folder: this file system lacks a feature, such as locks",
    errno.EPIPE: "the program that reads the output has ended",
    errno.EIO: f"check the disk or the network storage (dmesg), {AGAIN}",
    errno.ESTALE: f"mount the network storage again, {AGAIN}",
}
"""Fixes of errors that may not occur elsewhere or later."""

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open on this machine",
}


def explain_system_error(error: BaseException) -> Cae2pipeError | None:
    """The error to show instead of one raised by the operating system, by a library on its behalf, or by a package that
    cannot be imported; None for any other error, which is a defect."""
    text = str(error)
    if isinstance(error, MemoryError):
        return host_memory()
    if isinstance(error, OSError) and error.errno is not None:
        return _os_error(error)
    kind = type(error).__name__  # by name, so that commands without torch do not import it
    if kind == "SafetensorError" and (match := re.search(r"os error (\d+)", text)):
        return _os_error(OSError(int(match[1]), os.strerror(int(match[1]))))
    if isinstance(error, ImportError) and re.search("failed to map segment|[Cc]annot allocate memory", text):
        return host_memory()  # one of torch's libraries
    if isinstance(error, RuntimeError):
        if "DefaultCPUAllocator" in text:  # torch's MemoryError
            return host_memory()
        if kind == "OutOfMemoryError":
            return OutOfMemoryError(
                f"the device has run out of memory: {text.splitlines()[0]}",
                fix="stop other programs that use the device (nvidia-smi lists them), or choose another one: --device, "
                "if the command has it, or CUDA_VISIBLE_DEVICES",
            )
        if match := re.match(r"Symlink loop from (.*)", text):  # pathlib before Python 3.13
            return _os_error(OSError(errno.ELOOP, os.strerror(errno.ELOOP), match[1].strip("'")))
        if "can't start new thread" in text:
            return _os_error(OSError(errno.EAGAIN, "no more threads can be started"))
    if isinstance(error, ValueError) and re.search("embedded null (byte|character)", text):
        return BadInputError("a path contains a NUL character", fix="give a path without it")
    if isinstance(error, UnicodeEncodeError):
        name = error.object if len(error.object) < 300 else "..."
        return BadInputError(f"a name cannot be written as {error.encoding}: {name!r}", fix="rename it")
    return explain_import(error)


def host_memory() -> OutOfMemoryError:
    """The error to show if the machine's memory, not a device's, has run out."""
    return OutOfMemoryError(
        "this machine has run out of memory",
        fix="stop other programs, use fewer --workers (if the command has them), or a smaller batch",
    )


def _os_error(error: OSError) -> Cae2pipeError:
    number = error.errno or 0
    if number == errno.ENOMEM:
        return host_memory()
    said = error.strerror or os.strerror(number)
    if error.filename == STDOUT:
        unwritten = Cae2pipeError(f"{STDOUT} cannot be written: {said}")
        unwritten.shown_elsewhere = number == errno.EPIPE  # whoever reads it has seen enough
        return unwritten
    what = f"{FULL[number]}: {said}" if number in FULL else said
    where = error.filename if error.filename2 is None else f"{error.filename} -> {error.filename2}"
    where = os.fsdecode(where) if isinstance(where, bytes) else where
    if number in ASKED:
        return BadInputError(what, where=where, fix=ASKED[number])
    return StorageError(what, where=where, fix=FAILED.get(number, f"remove the cause, {AGAIN}"))
