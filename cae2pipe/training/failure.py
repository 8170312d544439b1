"""What is kept of a step that went wrong, so that it can be looked into again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.tensors import write_torch
from cae2pipe.errors import DamageError
from cae2pipe.exhaustion import reraise_exhaustion
from cae2pipe.loading.batches import Batch

FOLDER = "failures"


def failure_path(out: Path, step: int, rank: int) -> Path:
    """The file of one process; the leading one's also holds the weights."""
    return out / FOLDER / (f"step-{step:08d}.pt" if rank == 0 else f"step-{step:08d}-rank{rank}.pt")


def save_failure(path: Path, batch: Batch, latents: dict[str, Tensor], context: dict[str, Any]) -> None:
    """Write a batch (keys, views, masks, drop path's uniforms: all that was drawn), the latents it was trained on,
    torch's random state, and ``context`` (tensors and plain values)."""
    plain = {field.name: getattr(batch, field.name) for field in fields(batch)}
    state = {
        "batch": _on_cpu(plain),
        "latents": _on_cpu(latents),
        "random_state": torch.get_rng_state(),
        **_on_cpu(context),
    }
    write_torch(path, state)


def load_failure(path: Path) -> tuple[Batch, dict[str, Tensor], dict[str, Any]]:
    """The batch, its latents, and the rest, on the CPU.

    Raises:
        DamageError: no such file, or not one of these.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Batch(**state.pop("batch")), state.pop("latents"), state
    except Exception as error:  # torch.load raises many kinds
        reraise_exhaustion(error)
        raise DamageError(
            f"this is not the record of a failed step ({type(error).__name__})",
            where=path,
            fix=f"give a file of a run's folder {FOLDER}/",
        ) from None


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return {name: _on_cpu(item) for name, item in value.items()} if isinstance(value, dict) else value
