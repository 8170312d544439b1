"""A process that runs a job, with a fault at a given event.

Events are the calls that create or rename files, and steps of training: between two of them nothing on disk changes. At
the n-th event the process is killed, or gets a full-disk error.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import FinetuneSettings
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "ENOSPC")
EXITS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75, "ENOSPC": 1}


@dataclass(frozen=True)
class Job:
    """A command with its inputs and outputs. ``more``: further target sets."""

    name: str
    source: Path
    out: Path
    settings: ExtractSettings | PretrainSettings | FinetuneSettings | GridSettings
    more: tuple[Path, ...] = ()


def do(job: Job) -> None:
    """Run it as the command line would."""
    from cae2pipe.config.extract import CodecSettings
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.shards.build import build_shard_set
    from cae2pipe.stages.add_teacher import add_teacher
    from cae2pipe.stages.compare import compare
    from cae2pipe.stages.copy_set import copy_set
    from cae2pipe.stages.evaluate import evaluate
    from cae2pipe.stages.extract_targets import extract_targets
    from cae2pipe.stages.pretrain import pretrain
    from cae2pipe.stages.recode import recode
    from cae2pipe.stages.repair import repair
    from cae2pipe.stages.verify import verify

    report = Silent()
    if isinstance(job.settings, PretrainSettings):
        pretrain([job.source, *job.more], job.out, job.settings, report=report)
    elif isinstance(job.settings, GridSettings):
        speed = {"workers": 0, "device": "cpu"}
        compare(
            job.settings,
            "codecs",
            job.source / "fp16",
            data=job.source / "data",
            out=job.out,
            report=report,
            speed=speed,
        )
    elif isinstance(job.settings, FinetuneSettings):
        evaluate("finetune", str(job.source / "encoder"), job.source, out=job.out, settings=job.settings, report=report)
    elif job.name == "extract":
        extract_targets(job.source, job.out, job.settings, report=report)
    elif job.name == "add":
        add_teacher(job.out, job.settings, report=report)
    elif job.name == "shard":
        build_shard_set(job.source, job.out, job.settings.shard, report=report)
    elif job.name == "copy":
        copy_set(job.source, job.out, report=report, workers=1)
    elif job.name == "recode":
        recode(job.source, job.out, CodecSettings(calibration=64), report=report, workers=1)
    else:
        assert job.name == "repair"
        result = verify(job.out, report)
        repair(result, report, source=job.source, weights=job.settings.teacher.weights, device="cpu", workers=0)


def run(job: Job, fault: str, at: int, counted: Path) -> None:
    """Run the job with the fault at event ``at`` (-1: never). Writes the number of events to ``counted``."""
    import typer

    from cae2pipe.commands.shared import exits

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
                do(job)
        except typer.Exit as exit_:
            code = exit_.exit_code
    counted.write_text(str(count))
    sys.stdout.flush()
    os._exit(code)


def watch(event: Callable[[], None]) -> None:
    """Call ``event`` before every change on disk, and before every step of training."""
    from cae2pipe.artifacts import atomic, staging
    from cae2pipe.evaluation import features, finetune
    from cae2pipe.shards import build, listing
    from cae2pipe.stages import recode
    from cae2pipe.targets import chunks, view_writing
    from cae2pipe.training import step

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
    before(view_writing, "write_samples")
    before(listing, "write_bytes")
    before(recode, "fetch_file")
    before(Path, "replace")
    before(step.Step, "__call__")
    before(finetune.FinetuneLearner, "step")
    before(features, "write_part")
