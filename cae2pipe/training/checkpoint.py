"""Checkpoints: written atomically, pruned, and skipped on resuming if damaged or of another run."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.artifacts.tensors import write_torch
from cae2pipe.errors import DamageError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.world import World

CHECKPOINTS_FOLDER = "checkpoints"
PATTERN = re.compile(r"step-\d{8,}\.pt")
RUN = "run"
"""The entry with the fingerprint of the checkpoint's run. Checkpoints of older versions have none."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a training: their folder, their run, when to write one and which to keep.

    Args:
        run: the fingerprint of the run. keep: how many of the newest to keep. minutes: time between two checkpoints.
        for_good: whether the checkpoint of a step is never pruned.
    """

    folder: Path
    run: str
    keep: int
    minutes: float
    for_good: Callable[[int], bool] = lambda step: False

    def save(self, step: int, state: dict[str, Any]) -> None:
        save_checkpoint(self.folder, step, state, run=self.run, keep=self.keep, for_good=self.for_good)

    def resume(
        self,
        like: Callable[[], dict[str, Any]],
        restore: Callable[[dict[str, Any]], None],
        world: World,
        *,
        report: Report,
    ) -> int:
        """Make every process ``restore`` the newest checkpoint that fits. The leading process looks for it, as
        ``load_checkpoint`` does. Returns the steps done, 0 without a checkpoint."""
        state: dict[str, Any] | None = None

        def newest() -> int:
            nonlocal state
            state = load_checkpoint(self.folder, report, run=self.run, like=like())
            return state["step"] if state else 0

        start: int = world.run_on_main(newest)
        if start:
            restore(state or read_checkpoint(self.folder, start))
        return start


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.pt"


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    run: str,
    keep: int,
    for_good: Callable[[int], bool] = lambda step: False,
) -> Path:
    """Write ``step-00001234.pt``; remove all but the ``keep`` newest and those whose step is ``for_good``.

    Checkpoints of later steps are removed too: a damaged one that was skipped would otherwise count as the newest, and
    displace the one just written. ``state`` holds tensors and plain values; ``run`` is the fingerprint of the run.
    """
    path = folder / checkpoint_name(step)
    write_torch(path, {**state, "step": step, RUN: run})
    paths = checkpoints(folder)
    later = [other for other in paths if step_of(other) > step]
    earlier = [other for other in paths if step_of(other) <= step]
    for old in later + [other for other in earlier[:-keep] if not for_good(step_of(other))]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first. Files with other names, such as copies, are ignored."""
    paths = [path for path in folder.iterdir() if PATTERN.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in paths if path.is_file()), key=step_of)


def step_of(path: Path) -> int:
    """Steps done when a checkpoint was written."""
    return int(path.stem.removeprefix("step-"))


def load_checkpoint(folder: Path, report: Report, *, run: str, like: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint that fits, on the CPU; None if there are none. The log names those that are skipped.

    Args:
        run: the fingerprint of the run. like: a state that such a checkpoint could restore. All its entries must exist,
        tensors with the same shapes and types. Empty dictionaries and lists match any.

    Raises:
        DamageError: there are checkpoints, but none of them fits.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            # torch.load does not verify the checksums that torch.save wrote.
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} has changed")
            state: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types of exception for a truncated or changed file
            reraise_exhaustion(error)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            report.log(f"{path.name} cannot be read ({reason}): trying the checkpoint before it")
            continue
        problem = misfit(state, {**like, "step": step_of(path), **({RUN: run} if RUN in state else {})})
        if problem is None:
            return state
        report.log(f"{path.name} does not belong to this run ({problem}): trying the checkpoint before it")
    if paths:
        raise DamageError(
            f"none of the {len(paths)} checkpoints can be used, and starting again would lose their progress",
            where=folder,
            fix="restore one from a copy, or delete the folder to start at step 0",
        )
    return None


def misfit(state: Any, wanted: Any, where: str = "the file") -> str | None:
    """How a state differs in structure from ``wanted``, or None."""
    if isinstance(wanted, Tensor):
        if not isinstance(state, Tensor):
            return f"{where} is not a tensor"
        if (state.shape, state.dtype) != (wanted.shape, wanted.dtype):
            return f"{where} is {tuple(state.shape)} {state.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        return None
    if isinstance(wanted, dict):
        if not isinstance(state, dict):
            return f"{where} is not a dictionary"
        for name, value in wanted.items():
            if name not in state:
                return f"{where} has no {name!r}"
            if problem := misfit(state[name], value, str(name) if where == "the file" else f"{where}.{name}"):
                return problem
        return None
    if isinstance(wanted, list):
        return None if isinstance(state, list) else f"{where} is not a list"
    if isinstance(wanted, str | int) and where in ("step", RUN):
        return None if type(state) is type(wanted) and state == wanted else f"{where} is {state!r}, not {wanted!r}"
    return None


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Full weights and optimizer state by parameter names, on the CPU: the same for DDP, FSDP and one process.

    Must be called by all processes; if the model is sharded, only the leading process gets the tensors.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def restore_training(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore what ``training_state`` returned. Must be called by all processes, each with the full state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def read_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint that the leading process has found valid.

    Raises:
        DamageError: it cannot be read here.
    """
    path = folder / checkpoint_name(step)
    try:
        state: dict[str, object] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:
        reraise_exhaustion(error)
        raise DamageError(
            f"the checkpoint that the leading process resumes from cannot be read here ({type(error).__name__})",
            where=path,
            fix="use the same shared output folder on all machines",
        ) from None
