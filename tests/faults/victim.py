"""A process that runs an extraction and meets its fault at a given event.

Events are the calls through which files come into being or get their names: between two of them nothing on the disk
changes. The n-th is where the process is killed, or told that the disk is full.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from cae2pipe.config.extract import ExtractSettings

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "ENOSPC")
EXITS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "ENOSPC": 1}


def run(source: Path, out: Path, settings: ExtractSettings, fault: str, at: int, counted: Path) -> None:
    """Extract; meet the fault at event ``at`` (-1: never). The number of events is left in ``counted``."""
    import typer

    from cae2pipe.cli import exits
    from cae2pipe.progress import Silent
    from cae2pipe.stages.extract_targets import extract_targets

    count = 0

    def event() -> None:
        nonlocal count
        count += 1
        if count == at:
            if fault == "ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")
            os.kill(os.getpid(), getattr(signal, fault))

    watch(event)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    with redirect_stderr(StringIO()):
        try:
            with exits():
                extract_targets(source, out, settings, Silent())
        except typer.Exit as exit_:
            code = exit_.exit_code
    counted.write_text(str(count))
    sys.stdout.flush()
    os._exit(code)


def watch(event: Callable[[], None]) -> None:
    """Call ``event`` before everything that changes what is on the disk."""
    from cae2pipe.artifacts import atomic, staging
    from cae2pipe.shards import build
    from cae2pipe.stages import extract_targets
    from cae2pipe.targets import chunks

    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*values: Any, **named: Any) -> Any:
            event()
            return real(*values, **named)

        setattr(owner, name, watched)

    before(atomic, "fsync_path")
    before(staging, "fsync_path")
    before(chunks.ShardFile, "append")
    before(build, "write_samples")
    before(extract_targets, "write_samples")
    before(Path, "replace")
