"""The trained student: its loss compared with that of the mean target, and its predictions on test tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method
from cae2pipe.targets.target_set import Target, TargetSet
from cae2pipe.training.objective import TERMS, make_objective
from cae2pipe.training.step import forward
from cae2pipe.training.student import LatentPreview, preview_latents


class MeanStudent(nn.Module):
    """Predicts the set's mean token everywhere, independent of the image."""

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


def mean_over_views(
    model: Method | MeanStudent, targets: TargetSet, settings: PretrainSettings, *, device: torch.device
) -> dict[str, float]:
    """Loss and centred cosines of a model, averaged over all views of all images of a set."""
    settings = settings.model_copy(update={"epochs": targets.views})
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=model.drop_columns)
    objective = make_objective(model, targets, settings).to(device)
    values: list[list[float]] = []
    images: list[int] = []
    with torch.no_grad():
        for batch in load_batches(plan, 0, 0):
            batch = batch.to(device)
            values.append(forward(objective, batch, batch.arrays).tolist())
            images.append(batch.real)
    return dict(zip(TERMS, np.average(values, axis=0, weights=images).tolist(), strict=True))


def previews_of(
    model: Method, targets: TargetSet, settings: PretrainSettings, *, keys: Sequence[str], device: torch.device
) -> list[LatentPreview]:
    """Predictions for the first stored views with the given keys, in their order."""
    by_key: dict[str, Target] = {}
    for view in targets:
        if view.key in keys and view.key not in by_key:
            by_key[view.key] = view
    return preview_latents(
        model, settings, targets, views=[by_key[key] for key in keys if key in by_key], device=device
    )
