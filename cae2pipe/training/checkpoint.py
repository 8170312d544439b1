"""Checkpoints: written whole or not at all, some kept, a damaged newest one passed over."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cae2pipe.artifacts.tensors import write_torch
from cae2pipe.errors import DamageError
from cae2pipe.exhaustion import reraise_exhaustion
from cae2pipe.progress import Report


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], keep: int, for_good: Callable[[int], bool] = lambda step: False
) -> Path:
    """Write ``step-00001234.pt``; remove all but the ``keep`` newest and those whose step is ``for_good``.

    Those of later steps go too: a damaged one that was passed over would otherwise count as the newest, and push out
    the one just written. ``state`` holds tensors and plain values.
    """
    path = folder / f"step-{step:08d}.pt"
    write_torch(path, {**state, "step": step})
    found = checkpoints(folder)
    later = [other for other in found if step_of(other) > step]
    earlier = [other for other in found if step_of(other) <= step]
    for old in later + [other for other in earlier[:-keep] if not for_good(step_of(other))]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt")) if folder.is_dir() else []


def step_of(path: Path) -> int:
    """Steps done when a checkpoint was written."""
    return int(path.stem.removeprefix("step-"))


def load_checkpoint(folder: Path, report: Report) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU, or None. What is passed over is named in the log."""
    for path in reversed(checkpoints(folder)):
        try:
            # torch.load does not look at the checksums that torch.save wrote.
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} has changed")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a file that is cut off or changed
            reraise_exhaustion(error)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            report.log(f"{path.name} cannot be read ({reason}): going back to the checkpoint before it")
    return None


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by parameter names, whole, on the CPU: the same however the model is spread.

    To be called by all processes; where the model is sharded, only the leading one's is filled.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def restore_training(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back what ``training_state`` gave. To be called by all processes, each with the whole state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def read_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint that the leading process has found to be sound.

    Raises:
        DamageError: it cannot be read here.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reraise_exhaustion(error)
        raise DamageError(
            f"the checkpoint that the leading process goes on from cannot be read here ({type(error).__name__})",
            where=path,
            fix="let all machines write the run to the same shared folder",
        ) from None
