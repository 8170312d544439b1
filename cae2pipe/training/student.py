"""Loads a trained student with regressor and head, and computes its predictions for stored views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.artifacts.manifest_run import SeveralTeacher
from cae2pipe.artifacts.manifest_values import Licences
from cae2pipe.config.base import build_recorded
from cae2pipe.config.pretrain import LossSettings, PretrainSettings
from cae2pipe.errors import DamageError, SettingsError
from cae2pipe.methods.method import Heads, Method
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import student_normalise
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.target_set import Target, TargetSet
from cae2pipe.training.checkpoint import CHECKPOINTS_FOLDER, load_checkpoint
from cae2pipe.training.standardisation import Standardisation, standardises, stored_standardisation
from cae2pipe.training.target_spec import TargetSpec, side_by_side, target_spec


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


def licences_of(targets: TargetSet) -> Licences:
    """The licences of a target set's teacher and images, as far as they are known."""
    return targets.artifact.facts.get("licences", {})


def same_teacher(run: RunArtifact, targets: TargetSet) -> bool:
    """Whether a run was trained on the teacher of a target set, perhaps among others. Older runs do not record its
    library and weights, which are then not compared."""
    return number_of(run, targets) is not None


def number_of(run: RunArtifact, targets: TargetSet) -> int | None:
    """Which of a run's teachers is that of a target set; None if it is none of them."""
    wanted = teacher_of(targets)
    for number, known in enumerate(run.facts.get("teachers", [run.facts["teacher"]])):
        if all(known.get(name, value) == value for name, value in wanted.items()):
            return number
    return None


def load_student(run: Path, targets: TargetSet, report: Report) -> tuple[Method, PretrainSettings]:
    """``load_method`` of a run on this target set; of several teachers, with the head for that of the set."""
    settings, artifact = run_settings(run), RunArtifact.open(run)
    spec = target_spec(settings, targets)
    number = number_of(artifact, targets) or 0
    standard: Standardisation | None = None
    if "teachers" in artifact.facts and standardises(settings.loss):
        there = [name for name in sorted(artifact.facts["teachers"][number]["stores"]) if name in targets.stores]
        standard = stored_standardisation(targets, stores=there or None)
    return load_method(run, spec.dim, report, summary=spec.summary, teacher=number, standard=standard)


def load_method(
    run: Path,
    target_dim: int,
    report: Report,
    *,
    summary: int | None = None,
    teacher: int = 0,
    standard: Standardisation | None = None,
) -> tuple[Method, PretrainSettings]:
    """The student of a run's newest checkpoint, regressor and heads included, in eval mode on the CPU.

    Args:
        summary: as for ``build_method``. teacher: of several teachers, the one whose heads are kept. standard: how its
        targets were standardised, which predictions are freed of.

    Raises:
        DamageError: the run has no readable checkpoint. SettingsError: targets were standardised, and ``standard`` is
        not given; or the method has no heads for single teachers.
    """
    settings = run_settings(run)
    known = RunArtifact.open(run).facts.get("teachers")
    if known:
        if standard is None:
            refuse_standardised(settings.loss, run)
        spec = recorded_spec(settings, known)
        target_dim, summary = spec.dim, spec.summary
    model = build_method(settings.method, settings.model, target_dim, summary)
    like = {"model": model.state_dict()}
    state = load_checkpoint(run / CHECKPOINTS_FOLDER, report, run=RunArtifact.open(run).fingerprint, like=like)
    if state is None:
        raise DamageError("the run has no readable checkpoint", where=run, fix="delete the run and train again")
    model.load_state_dict(state["model"])
    if known:
        keep_teacher(model, spec, teacher, standard, where=run)
    return model.eval(), settings


def refuse_standardised(loss: LossSettings, where: object) -> None:
    """Raise SettingsError if runs of several teachers with this loss do not predict the teachers' own latents."""
    if standardises(loss):
        raise SettingsError(
            f"this run learned standardised latents of several teachers (loss.kind is {loss.kind})",
            where=where,
            fix="use a run with loss.kind=cosine, or one of a single teacher",
        )


def recorded_spec(settings: PretrainSettings, teachers: Sequence[SeveralTeacher]) -> TargetSpec:
    """The targets of a run of several teachers, from its manifest."""
    parts = []
    for known in teachers:
        width = known.get("summary")
        aligned = settings.loss.aligns_summary(known["class_token"], stored=width is not None)
        mean = torch.zeros(known["dim"])
        parts.append(TargetSpec(known["dim"], known["class_token"], mean, width if aligned else None))
    return side_by_side(parts)


class Unstandardised(nn.Module):
    """From standardised latents to the teacher's own."""

    def __init__(self, standard: Standardisation):
        super().__init__()
        self.mean, self.matrix = (nn.Buffer(each) for each in (standard.mean, torch.linalg.inv(standard.matrix)))

    def forward(self, latents: Tensor) -> Tensor:
        return latents.float() @ self.matrix + self.mean


def keep_teacher(
    model: Method, spec: TargetSpec, number: int, standard: Standardisation | None, *, where: Path
) -> None:
    """Replace the heads of several teachers by those of one. Raises SettingsError if the method has none."""
    pooled = [index for index, part in enumerate(spec.parts) if part.summary is not None]
    heads = {name: child for name, child in model.named_children() if isinstance(child, Heads)}
    if not heads.keys() - {"summary_head"}:
        raise SettingsError(
            "the method of this run has no head for each of its teachers",
            where=where,
            fix="make its heads with latent_head(settings, width, target_dim)",
        )
    for name, head in heads.items():
        if name == "summary_head":
            own = head[pooled.index(number)] if number in pooled else None
        else:
            own = nn.Sequential(head[number], Unstandardised(standard)) if standard else head[number]
        setattr(model, name, own)


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
