"""Records of failed steps, so that they can be replayed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from cae2pipe.artifacts.storage import open_file
from cae2pipe.artifacts.tensors import write_torch
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import DamageError, DivergedError, command
from cae2pipe.loading.batches import Batch
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.training.checkpoint import training_state
from cae2pipe.training.objective import TERMS, Objective
from cae2pipe.training.step import Outcome, Step

FOLDER = "failures"


def failure_path(out: Path, step: int, rank: int) -> Path:
    """The file of one process; the leading process's file also holds the weights."""
    return out / FOLDER / (f"step-{step:08d}.pt" if rank == 0 else f"step-{step:08d}-rank{rank}.pt")


def save_failure(path: Path, batch: Batch, latents: dict[str, Tensor], *, context: dict[str, Any]) -> None:
    """Write a batch (keys, views, masks, uniforms of drop path: all random draws), the latents it was trained on,
    torch's random state, and ``context`` (tensors and plain values)."""
    plain = {field.name: getattr(batch, field.name) for field in fields(batch)}
    state = {
        "batch": _on_cpu(plain),
        "latents": _on_cpu(latents),
        "random_state": torch.get_rng_state(),
        **_on_cpu(context),
    }
    write_torch(path, state)


def capture(
    step: Step,
    outcome: Outcome,
    values: dict[str, float],
    *,
    settings: PretrainSettings,
    target_dim: int,
    out: Path,
) -> DivergedError:
    """Record a step whose loss or gradient is not finite, with the weights before it. Returns the error to raise."""
    batch, world = outcome.batch, step.world
    weights = training_state(step.model, step.optimizer)["model"]
    path = failure_path(out, batch.step, world.rank)
    context: dict[str, Any] = {
        "settings": settings.model_dump_json(),
        "target_dim": int(target_dim),
        "values": values,
        **_context(step.objective),
    }
    if world.is_main:
        context["weights"] = weights
    save_failure(path, batch, step.objective.decoded_targets(step.latents(batch)), context=context)
    error = DivergedError(
        f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g} at step {batch.step}: not finite; "
        "weights and optimizer are unchanged since the step before",
        where=path,
        fix=f"`{command('replay', path)}` repeats the step and says where it fails; if the data are fine, "
        "lower optimizer.lr",
    )
    error.shown_elsewhere = not world.is_main
    return error


def _context(objective: Objective) -> dict[str, Any]:
    """What a replay must know of the objective besides its weights."""
    first = objective.parts[0]
    context = {"class_token": first.class_token, "summary": first.pooled, "mean": first.mean}
    if not objective.labels:
        return context
    teachers = [
        {
            "label": label,
            "width": part.width,
            "summary": part.pooled,
            "class_token": part.class_token,
            "weight": part.weight,
            "mean": part.mean,
        }
        for label, part in zip(objective.labels, objective.parts, strict=True)
    ]
    return {**context, "teachers": teachers}


def load_failure(path: Path) -> tuple[Batch, dict[str, Tensor], dict[str, Any]]:
    """The batch, its latents, and the rest, on the CPU.

    Raises:
        DamageError: the file does not exist, or is not such a record.
    """
    try:
        with open_file(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        # Records of earlier versions have no labels, which no loss uses.
        if isinstance(state, dict) and isinstance(batch := state.get("batch"), dict) and "keys" in batch:
            batch.setdefault("labels", [-1] * len(batch["keys"]))
        FailureRecord.model_validate(state)
        return Batch(**state.pop("batch")), state.pop("latents"), state
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except Exception as error:  # torch.load raises many types
        reraise_exhaustion(error)
        reason = type(error).__name__
    raise no_record(path, reason)


def no_record(path: Path, reason: str) -> DamageError:
    """The error for a file that is not a complete record of a failed step."""
    return DamageError(
        f"this is not a record of a failed step ({reason})",
        where=path,
        fix=f"give a file from the folder {FOLDER}/ of a run",
    )


class FailedTeacher(BaseModel):
    """One of several teachers in a record."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    label: str
    width: int = Field(ge=1, le=2**20)
    summary: int | None = Field(default=None, ge=1, le=2**20)
    class_token: bool
    weight: float = Field(gt=0)
    mean: Tensor


class FailureRecord(BaseModel):
    """The content of a file that ``save_failure`` wrote. Only the leading process's file has ``weights``."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    batch: dict[str, Any]
    latents: dict[str, Tensor]
    settings: str
    target_dim: int = Field(ge=1, le=2**20)
    class_token: bool
    summary: int | None = Field(default=None, ge=1, le=2**20)
    mean: Tensor
    teachers: list[FailedTeacher] | None = None
    values: dict[str, float]
    weights: dict[str, Tensor] | None = None

    @field_validator("batch")
    @classmethod
    def _whole(cls, value: dict[str, Any]) -> dict[str, Any]:
        wanted = get_type_hints(Batch)
        for name, kind in wanted.items():
            if not isinstance(value.get(name), get_origin(kind) or kind):
                raise ValueError(f"{name} is not a {kind}")
        if value.keys() != wanted.keys():
            raise ValueError(f"it holds {sorted(value.keys() - wanted.keys())}")
        return value

    @field_validator("latents")
    @classmethod
    def _decoded(cls, value: dict[str, Tensor]) -> dict[str, Tensor]:
        if "decoded" not in value:
            raise ValueError("decoded is missing")
        return value

    @field_validator("values")
    @classmethod
    def _figures(cls, value: dict[str, float]) -> dict[str, float]:
        if missing := {*TERMS, "grad_norm"} - value.keys():
            raise ValueError(f"{min(missing)} is missing")
        return value


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return {name: _on_cpu(item) for name, item in value.items()} if isinstance(value, dict) else value
