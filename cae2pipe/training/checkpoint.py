"""Checkpoints: written whole or not at all, the newest few kept, a damaged newest one passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.atomic import replacing
from cae2pipe.progress import Report


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``step-00001234.pt`` and remove all but the ``keep`` newest. ``state`` holds tensors and plain values."""
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as temporary:
        torch.save({**state, "step": step}, temporary)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt")) if folder.is_dir() else []


def load_checkpoint(folder: Path, report: Report) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU, or None. What is passed over is named in the log."""
    for path in reversed(checkpoints(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a file that is cut off or changed
            report.log(f"{path.name} cannot be read ({type(error).__name__}): going back to the checkpoint before it")
    return None
