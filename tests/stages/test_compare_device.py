"""A grid on one device: every run is compiled, and none leaves anything in memory."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cae2pipe.errors import DivergedError, OutOfMemoryError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import compare as stage
from cae2pipe.stages import pretrain as training
from cae2pipe.stages.compare import compare
from cae2pipe.training.step import Step
from tests.stages.test_compare import SPEED, data, grid  # noqa: F401

WILD = {"lr": 1e30, "scale_lr": False, "clip": 1e30}


@pytest.fixture
def steps(monkeypatch) -> weakref.WeakSet:
    """All steps, with model, optimizer and batches, that are still alive."""
    alive: weakref.WeakSet = weakref.WeakSet()

    class Watched(Step):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            alive.add(self)

    monkeypatch.setattr(training, "Step", Watched)
    monkeypatch.setattr(stage, "evaluate", lambda *_, **__: None)
    return alive


def test_runs_are_compiled_once_each_and_one_model_is_there_at_a_time(
    target_root,
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    steps,
):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(training, "compile_objective", partial(training.compile_objective, backend=counter))
    real, alive, graphs = stage.pretrain, [], []

    def watched(*arguments, **named):
        alive.append(len(steps))
        before = counter.frame_count
        try:
            return real(*arguments, **named)
        finally:
            graphs.append(counter.frame_count - before)

    monkeypatch.setattr(stage, "pretrain", watched)
    variants = [{"name": f"{count} hidden", "set": {"mask": {"count": count}}} for count in range(2, 5)]
    variants[1]["set"]["optimizer"] = WILD
    common = {**grid().set, "speed": {"compile": True}}
    # torch stops compiling a function at its limit, whose default is above these three runs.
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(DivergedError) as caught:
        compare(
            grid(variants=variants, seeds=0, set=common),
            "ratios",
            target_root,
            data=data,
            out=tmp_path,
            report=Silent(),
            speed=SPEED,
        )
    assert graphs == [1] * 3
    assert alive == [0] * 3
    gc.collect()
    assert not steps, "the error that was kept holds a run"
    assert "not finite" in caught.value.what


def test_memory_that_ends_in_one_run_is_free_for_the_next(target_root, data, tmp_path, monkeypatch, steps):  # noqa: F811
    real, alive = stage.pretrain, []

    def watched(*arguments, **named):
        alive.append(len(steps))
        return real(*arguments, **named)

    def ended(self, batch, accumulation):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(stage, "pretrain", watched)
    monkeypatch.setattr(Step, "backward", ended)
    with pytest.raises(OutOfMemoryError, match="not even one image per pass"):
        compare(grid(seeds=0), "losses", target_root, data=data, out=tmp_path, report=Silent(), speed=SPEED)
    assert alive == [0, 0]
