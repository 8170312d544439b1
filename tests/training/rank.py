"""The program of each of several processes in tests: ``train``, or ``python -m tests.training.rank JOB.json``.

A job trains a run. ``kill`` is the step at which the leading process dies, ``signal`` the step at which the last
process gets SIGUSR1, and ``probe_signal`` says whether it gets that in each probe. The outcome of each process is
written next to the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from cae2pipe.config.base import build
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import Requeued, Terminated
from cae2pipe.evaluation.labelled_crops import LabelledCrops
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.step import NO_FLAGS, Step


def train(job: dict) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meddle(job, rank, ranks)
    end = "done"
    out = Path(job["out"])
    try:
        given = job["targets"]
        roots = list(map(Path, given)) if isinstance(given, list) else Path(given)
        pretrain(roots, out, build(PretrainSettings, job["settings"], "test"), report=Silent())
    except (Requeued, Terminated) as error:
        end = type(error).__name__
    out.with_name(f"{out.name}-{rank}.end").write_text(end)


def meddle(job: dict, rank: int, ranks: int) -> None:
    real = Step.__call__

    def call(self: Step, batch, lr, flags=NO_FLAGS):
        if batch.step == job.get("kill") and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if batch.step == job.get("signal") and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, batch, lr, flags)

    features = LabelledCrops.features

    def read(self: LabelledCrops, split, encode):
        if job.get("probe_signal") and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return features(self, split, encode)

    Step.__call__ = call  # type: ignore[method-assign]
    LabelledCrops.features = read  # type: ignore[method-assign]


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))
