"""The loop itself, with steps that only record their arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.errors import OutOfMemoryError, Terminated
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import World
from cae2pipe.training.checkpoint import Checkpoints
from cae2pipe.training.metrics import MetricsFile
from cae2pipe.training.step import Flags
from cae2pipe.training.step_loop import run_steps

DEVICES = {"cpu": torch.device("cpu"), "ahead": torch.device("meta")}


class Noted:
    """Empty steps. ``told``: the flags that come back with the outcome of a step. ``ends``: the end of an epoch, in
    steps, that asks to stop."""

    def __init__(self, folder: Path, told: dict[int, Flags], epoch: int = 4, full: int = -1, ends: int = -1):
        self.metrics = MetricsFile(folder / "metrics.jsonl", 0, Silent())
        self.told, self.epoch, self.full, self.ends = told, epoch, full, ends
        self.begun: list[int] = []
        self.settled: list[int] = []
        self.saved: list[int] = []
        self.epochs: list[int] = []

    def items(self):
        return iter(range(1000))

    def step(self, item, flags):
        if item == self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has ...")
        self.begun.append(item)
        return item

    def out_of_memory(self, item, reason):
        assert sys.exc_info() == (None, None, None), "what the failed pass holds is not free yet"
        return OutOfMemoryError(f"step {item}: {reason}")

    def settle(self, outcome):
        self.settled.append(outcome)
        return self.told.get(outcome, Flags())

    def ends_epoch(self, done):
        return done % self.epoch == 0

    def end_epoch(self, done):
        assert self.settled == self.begun == list(range(done))
        self.epochs.append(done)
        return Flags(checkpoint_due=len(self.epochs) % 2 == 0, stop=done == self.ends)

    def state(self):
        assert self.settled == self.begun, "a checkpoint of a step that may have diverged"
        self.saved.append(len(self.begun))
        return {}


def looped(training: Noted, folder: Path, device: str, ranks: int = 1, limit: int = 10) -> int:
    checkpoints = Checkpoints(folder / "checkpoints", "run", keep=2, minutes=10)
    try:
        return run_steps(
            training,
            0,
            limit,
            checkpoints=checkpoints,
            world=World(0, ranks, DEVICES[device], "ddp"),
            report=Silent(),
        )
    finally:
        training.metrics.close()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(DEVICES)), st.integers(1, 12), st.integers(1, 5), st.sets(st.integers(0, 11)))
def test_every_outcome_is_read_once_and_before_a_checkpoint(device, limit, epoch, due):
    with TemporaryDirectory() as folder:
        training = Noted(Path(folder), dict.fromkeys(due, Flags(checkpoint_due=1.0)), epoch)
        assert looped(training, Path(folder), device, limit=limit) == limit
    assert training.settled == training.begun == list(range(limit))
    assert training.epochs == list(range(epoch, limit + 1, epoch))
    behind = 0 if device == "cpu" else 1
    # Before a checkpoint for another reason, earlier outcomes are read without using their flags.
    wanted = {limit, *training.epochs[1::2]} | ({step + 1 for step in due if step < limit} if not behind else set())
    assert wanted <= set(training.saved) if behind else wanted == set(training.saved)
    assert training.saved == sorted(set(training.saved))


@pytest.mark.parametrize(("device", "done"), [("cpu", 4), ("ahead", 5)])
def test_a_stop_that_another_process_was_told_of_is_everyones(device, done, tmp_path):
    """Even if this process got no signal. On a device it learns of it after the next step has started."""
    training = Noted(tmp_path, {3: Flags(stop=1.0)}, epoch=100)
    with pytest.raises(Terminated):
        looped(training, tmp_path, device, ranks=2)
    assert training.begun == training.settled == list(range(done))
    assert training.saved == [done]
    assert [path.stem for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{done:08d}"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_end_of_an_epoch_can_ask_to_stop(device, tmp_path):
    """As a signal during work between epochs does: the checkpoint is of that epoch, and no further step is done."""
    training = Noted(tmp_path, {}, ends=4)
    with pytest.raises(Terminated):
        looped(training, tmp_path, device, ranks=2)
    assert training.begun == training.settled == list(range(4))
    assert training.saved == [4]


def test_items_that_end_early_are_a_defect(tmp_path):
    """No signal: neither an exit code of one, nor a silent end. What is done is kept."""
    training = Noted(tmp_path, {}, epoch=100)
    training.items = lambda: iter(range(3))
    with pytest.raises(RuntimeError, match="ended after 3 of 10 steps"):
        looped(training, tmp_path, "ahead")
    assert training.settled == [0, 1, 2]
    assert training.saved == [3]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_does_not_fit_is_explained_when_it_holds_nothing_any_more(device, tmp_path):
    with pytest.raises(OutOfMemoryError, match="step 2: CUDA out of memory"):
        looped(Noted(tmp_path, {}, full=2), tmp_path, device)
