"""The exceptions that users can see.

Every message says what was wrong, where it was (file, shard, block, key, setting) and what to do about it.
The command line prints them without a traceback and ends with ``exit_code``.
"""

from __future__ import annotations

import shlex

FAILURE = 1
BAD_INPUT = 2
REQUEUE = 75
INTERRUPTED = 130
TERMINATED = 143


def command(*arguments: object) -> str:
    """A command of cae2pipe with these arguments, quoted for a shell: for fixes and logs."""
    return shlex.join(["cae2pipe", *map(str, arguments)])


class Cae2pipeError(Exception):
    """Base of every error meant for a user.

    Args:
        what: what was wrong, in one sentence.
        where: the file, shard, block, key or setting it was found in.
        fix: the command or setting that fixes it.
    """

    exit_code = FAILURE
    shown_elsewhere = False
    """The user needs no message: another process of the same job reports it, or the output's reader has ended."""

    def __init__(self, what: str, *, where: object = None, fix: str | None = None):
        # Exception pickles through self.args: everything is passed on so that errors survive worker processes.
        super().__init__(what, where, fix)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


def _rebuild(kind: type[Cae2pipeError], what: str, where: str | None, fix: str | None) -> Cae2pipeError:
    return kind(what, where=where, fix=fix)


class BadInputError(Cae2pipeError):
    """Bad usage or bad input: exit code 2."""

    exit_code = BAD_INPUT


class ReadOnlyError(BadInputError):
    """An output folder cannot be written."""


class SettingsError(BadInputError):
    """A setting is unknown, out of range, or contradicts another."""


class SourceError(BadInputError):
    """The images or shards given as a source cannot be used."""


class ImageError(BadInputError):
    """One image cannot be decoded. Stages catch it and write the image into ``rejects.jsonl``."""


class TeacherError(BadInputError):
    """The teacher's weights are missing, do not fit, or give degenerate features."""


class ManifestError(BadInputError):
    """A folder has no manifest, one of another kind, or one of an unknown format."""


class MismatchError(BadInputError):
    """A folder was made with settings or inputs that differ from the requested ones."""


class DamageError(BadInputError):
    """Stored data are missing, truncated or changed."""


class LockedError(BadInputError):
    """Another process is writing the same folder."""


class StorageError(Cae2pipeError):
    """A remote file system failed, or a disk is full; the same command may succeed later."""


class WorkerError(Cae2pipeError):
    """A worker process was killed."""


class DivergedError(Cae2pipeError):
    """The loss or a gradient is not finite."""


class OutOfMemoryError(Cae2pipeError):
    """A step, or other work, does not fit into the device's memory."""


class CompileError(Cae2pipeError):
    """torch.compile could not compile a model on this machine."""


class Requeued(BaseException):
    """SIGUSR1 arrived, which schedulers send some time before they take the machine away: exit with code 75."""


class Terminated(BaseException):
    """SIGTERM arrived. Raised in the main thread, like KeyboardInterrupt, so that nothing swallows it by accident."""
