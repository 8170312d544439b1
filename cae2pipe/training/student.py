"""Loads a trained student with regressor and head, and computes its predictions for stored views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.config.base import build_recorded
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import DamageError
from cae2pipe.methods.method import Method
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import student_normalise
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.target_set import Target, TargetSet
from cae2pipe.training.checkpoint import CHECKPOINTS_FOLDER, load_checkpoint
from cae2pipe.training.target_spec import target_spec


@dataclass(frozen=True)
class LatentPreview:
    """One stored view: its pixels, its mask, and the unit latents of teacher and student.

    view (S, S, 3) uint8; mask bool (rows, cols), True is masked; teacher and student (P, D), the student's zero for
    patches without a prediction; cosine: mean centred cosine over the masked patches, NaN if none is predicted.
    """

    key: str
    view: np.ndarray
    mask: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    cosine: float


def run_settings(run: Path) -> PretrainSettings:
    """The settings that a run was made with."""
    return build_recorded(PretrainSettings, RunArtifact.open(run).identity["settings"], where=run)


def teacher_of(targets: TargetSet) -> dict[str, Any]:
    """The entry of a run's manifest about the teacher of its target set."""
    made_by = targets.artifact.identity["teacher"]
    return {**targets.artifact.facts["teacher"], "library": made_by["library"], "weights": made_by["weights"]}


def same_teacher(run: RunArtifact, targets: TargetSet) -> bool:
    """Whether a run was trained on the teacher of a target set. Older runs do not record its library and weights, which
    are then not compared."""
    known = run.facts["teacher"]
    return all(known.get(name, value) == value for name, value in teacher_of(targets).items())


def load_student(run: Path, targets: TargetSet, report: Report) -> tuple[Method, PretrainSettings]:
    """``load_method`` of a run on this target set."""
    return load_method(run, target_spec(run_settings(run), targets).dim, report)


def load_method(run: Path, target_dim: int, report: Report) -> tuple[Method, PretrainSettings]:
    """The student of a run's newest checkpoint, regressor and head included, in eval mode on the CPU.

    Raises:
        DamageError: the run has no readable checkpoint.
    """
    settings = run_settings(run)
    model = build_method(settings.method, settings.model, target_dim)
    like = {"model": model.state_dict()}
    state = load_checkpoint(run / CHECKPOINTS_FOLDER, report, run=RunArtifact.open(run).fingerprint, like=like)
    if state is None:
        raise DamageError("the run has no readable checkpoint", where=run, fix="delete the run and train again")
    model.load_state_dict(state["model"])
    return model.eval(), settings


def mask_of(settings: PretrainSettings, view: Target) -> np.ndarray:
    """The mask, bool (rows, cols), of a stored view in the first epoch of a run."""
    grid, key = settings.model.grid, ("mask", settings.seed, 0, view.key)
    attention = None if view.attention is None else np.asarray(view.attention)
    return draw_mask(settings.mask.strategy, grid, grid, settings.masked_patches, *key, attention=attention)


@torch.no_grad()
def preview_latents(
    model: Method, settings: PretrainSettings, targets: TargetSet, *, views: Sequence[Target], device: torch.device
) -> list[LatentPreview]:
    """Predictions of a student that learns latents, for some stored views under the masks of its first epoch."""
    model = model.to(device)
    masks = [mask_of(settings, view) for view in views]
    visible, masked = (torch.from_numpy(np.stack(part)) for part in zip(*map(split_indices, masks), strict=True))
    visible, masked = visible.to(device), masked.to(device)
    prediction = model(as_pixels(views, device), visible, masked)
    tokens = torch.from_numpy(np.stack([view.tokens for view in views])).to(device)
    target = F.normalize(tokens, dim=-1)[:, targets.teacher.class_token :]
    student = torch.zeros_like(target)
    for indices, predicted in ((visible, prediction.visible), (masked, prediction.masked)):
        if predicted is not None:
            student.scatter_(1, indices.unsqueeze(-1).expand_as(predicted), F.normalize(predicted.float(), dim=-1))
    centre = targets.mean.to(device)
    cosines = F.cosine_similarity(student - centre, target - centre, dim=-1).gather(1, masked).mean(dim=1)
    if prediction.masked is None:
        cosines = torch.full_like(cosines, torch.nan)
    teacher, student = target.cpu(), student.cpu()
    return [
        LatentPreview(
            view.key, view.pixels, mask, teacher[index].numpy(), student[index].numpy(), float(cosines[index])
        )
        for index, (view, mask) in enumerate(zip(views, masks, strict=True))
    ]


@torch.no_grad()
def image_features(model: Method, views: Sequence[Target], device: torch.device, *, batch: int = 64) -> Tensor:
    """The encoder's mean patch token of each unmasked view, of unit length, (N, W) on the CPU."""
    encoder = model.to(device).encoder
    parts = [
        encoder(as_pixels(views[low : low + batch], device))[:, 1:].mean(dim=1) for low in range(0, len(views), batch)
    ]
    return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def as_pixels(views: Sequence[Target], device: torch.device) -> Tensor:
    """Views as input of a student, (B, 3, S, S), normalised."""
    pixels = torch.from_numpy(np.stack([view.pixels for view in views])).permute(0, 3, 1, 2).to(device)
    images: Tensor = student_normalise(device)(pixels)
    return images
