"""What predictions are compared with: the teacher's latents, or the student's own patches of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class Aim:
    """Tokens of ``dim`` dimensions, one for the class token or none, whose mean unit token is ``mean`` (dim,)."""

    dim: int
    class_token: bool
    mean: Tensor


def aim_of(settings: PretrainSettings, targets: TargetSet) -> Aim:
    """The aim of a run on a target set."""
    if settings.loss.target == "pixels":
        dim = 3 * settings.model.patch_size**2
        return Aim(dim, False, torch.zeros(dim))
    return Aim(targets.teacher.dim, targets.teacher.class_token, targets.mean)


def normalised_patches(pixels: Tensor, grid: int) -> Tensor:
    """Patches of pixels, uint8 (B, 3, S, S), as MAE's targets, float32 (B, grid * grid, 3 (S / grid)^2): normalised as
    the student's input is, then each brought to mean 0 and variance 1 over its own values."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    side = pixels.shape[-1] // grid
    patches = F.unfold((pixels.float() / 255 - mean) / std, side, stride=side).transpose(1, 2)
    return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)


class PixelTargets:
    """Where a step's targets come from if they are pixels."""

    def __init__(self, grid: int):
        self.grid = grid

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        """As an objective takes them."""
        return {"decoded": normalised_patches(batch.pixels, self.grid)}
