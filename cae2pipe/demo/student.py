"""The trained student looked at again: its loss beside the mean target's, and what it predicts on test tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.artifacts.box import open_box
from cae2pipe.config.base import build
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import DamageError
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.loader import load_batches
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD
from cae2pipe.progress import Report
from cae2pipe.stages.pretrain import make_objective, make_plan
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.checkpoint import load_checkpoint
from cae2pipe.training.objective import TERMS
from cae2pipe.training.step import forward


class MeanStudent(nn.Module):
    """Answers with the set's mean token everywhere: the student that has learnt nothing of the image."""

    drop_columns = 0

    def __init__(self, mean: Tensor):
        super().__init__()
        self.mean = mean

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        batch = len(pixels)
        token = self.mean.to(pixels.device)
        return Prediction(
            token.expand(batch, 1, -1),
            token.expand(batch, visible.shape[1], -1),
            token.expand(batch, masked.shape[1], -1),
        )


@dataclass(frozen=True)
class Forecast:
    """One test view: its pixels, what was hidden, the teacher's unit latents and the student's.

    view (S, S, 3) uint8; mask bool (rows, cols), True is masked; teacher and student (P, D); cosine: the mean centred
    cosine over the masked patches.
    """

    key: str
    view: np.ndarray
    mask: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    cosine: float


def run_settings(run: Path) -> PretrainSettings:
    """The settings that a run was made with."""
    return build(PretrainSettings, open_box(run, "run").identity["settings"], where=run)


def load_student(run: Path, targets: TargetSet, report: Report) -> tuple[nn.Module, PretrainSettings]:
    """The student of a run's newest checkpoint, regressor and head included, in eval mode on the CPU.

    Raises:
        DamageError: the run has no readable checkpoint.
    """
    settings = run_settings(run)
    model = build_method(settings.method, settings.model, targets.teacher.dim)
    state = load_checkpoint(run / "checkpoints", report)
    if state is None:
        raise DamageError("the run has no readable checkpoint", where=run, fix="delete the run and train it again")
    model.load_state_dict(state["model"])
    return model.eval(), settings


def mean_over_views(
    model: nn.Module, targets: TargetSet, settings: PretrainSettings, device: torch.device
) -> dict[str, float]:
    """Loss and centred cosines of a model, mean over every view of every image of a set."""
    settings = settings.model_copy(update={"epochs": targets.views})
    plan = make_plan(targets, sorted(targets.stores), settings, model.drop_columns)
    objective = make_objective(model, targets, settings).to(device)
    values: list[list[float]] = []
    images: list[int] = []
    with torch.no_grad():
        for batch in load_batches(plan, 0, 0):
            batch = batch.to(device)
            values.append(forward(objective, batch, batch.arrays).tolist())
            images.append(batch.real)
    return dict(zip(TERMS, np.average(values, axis=0, weights=images).tolist(), strict=True))


def forecasts(
    model: nn.Module, targets: TargetSet, settings: PretrainSettings, keys: Sequence[str], device: torch.device
) -> list[Forecast]:
    """What the student predicts for the views with the given keys, in their order. Masks are those of epoch 0."""
    plan = make_plan(targets, sorted(targets.stores), settings.model_copy(update={"epochs": 1}), model.drop_columns)
    model = model.to(device)
    found: dict[str, Forecast] = {}
    for batch in load_batches(plan, 0, 0):
        wanted = [row for row, key in enumerate(batch.keys) if key in keys]
        if wanted:
            found |= {p.key: p for p in _predict(model, batch.to(device), wanted, targets, settings.model.grid)}
    return [found[key] for key in keys if key in found]


@torch.no_grad()
def _predict(model: nn.Module, batch: Batch, rows: list[int], targets: TargetSet, grid: int) -> list[Forecast]:
    device = batch.pixels.device
    target = F.normalize(targets.layout.codec.decode(batch.arrays)[rows], dim=-1)[:, targets.teacher.class_token :]
    visible, masked = batch.visible[rows], batch.masked[rows]
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    prediction = model((batch.pixels[rows].float() / 255 - mean) / std, visible, masked)
    student = torch.zeros_like(target)
    for indices, tokens in ((visible, prediction.visible), (masked, prediction.masked)):
        if tokens is not None:
            student.scatter_(1, indices.unsqueeze(-1).expand_as(tokens), F.normalize(tokens.float(), dim=-1))
    centre = targets.mean.to(device)
    cosines = F.cosine_similarity(student - centre, target - centre, dim=-1).gather(1, masked).mean(dim=1)
    hidden = torch.zeros(target.shape[:2], dtype=torch.bool, device=device).scatter_(1, masked, True)
    return [
        Forecast(
            key=batch.keys[row],
            view=batch.pixels[row].permute(1, 2, 0).cpu().numpy(),
            mask=hidden[place].view(grid, grid).cpu().numpy(),
            teacher=target[place].cpu().numpy(),
            student=student[place].cpu().numpy(),
            cosine=float(cosines[place]),
        )
        for place, row in enumerate(rows)
    ]
