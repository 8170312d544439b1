"""The targets of predictions: the teacher's latents, or the pixels of the student's input patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.methods.method import Widths
from cae2pipe.models.export import student_normalise
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class TargetSpec:
    """Target tokens of ``dim`` dimensions, with or without a class token; their mean unit token is ``mean`` (dim,).
    ``summary``: width of the teacher's summary if it is a target too. ``parts``: of every teacher, if there are
    several; ``dim`` and ``summary`` are then those of all side by side, and the rest is the first one's."""

    dim: int
    class_token: bool
    mean: Tensor
    summary: int | None = None
    parts: tuple[TargetSpec, ...] = ()


def target_spec(settings: PretrainSettings, targets: TargetSet, others: Sequence[TargetSet] = ()) -> TargetSpec:
    """The targets of a run on a target set, and on ``others`` of further teachers."""
    if others:
        return side_by_side([target_spec(settings, each) for each in (targets, *others)])
    if settings.loss.target == "pixels":
        dim = 3 * settings.model.patch_size**2
        return TargetSpec(dim, False, torch.zeros(dim))
    teacher = targets.teacher
    summary = settings.loss.aligns_summary(teacher.class_token, stored=teacher.summary is not None)
    return TargetSpec(teacher.dim, teacher.class_token, targets.mean, teacher.summary if summary else None)


def side_by_side(parts: Sequence[TargetSpec]) -> TargetSpec:
    """The targets of several teachers, or of one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    summaries = [part.summary for part in parts if part.summary is not None]
    dim, summary = Widths([part.dim for part in parts]), Widths(summaries) if summaries else None
    return TargetSpec(dim, first.class_token, first.mean, summary, tuple(parts))


class PixelTargets:
    """The targets of a step if they are pixels, as in MAE: every patch of the student's input, normalised to mean 0 and
    variance 1 over its own values.

    Args:
        grid: patches along one side. device: the device of the batches.
    """

    def __init__(self, grid: int, device: torch.device):
        self.grid = grid
        # Copied once: a copy in every step would wait for the device.
        self.normalise = student_normalise(device)

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        """``decoded`` (B, grid * grid, 3 (S / grid)^2) float32, of pixels (B, 3, S, S) uint8."""
        patches = unfolded(self.normalise(batch.pixels), self.grid)
        return {"decoded": F.layer_norm(patches, patches.shape[-1:], eps=1e-6)}


def unfolded(images: Tensor, grid: int) -> Tensor:
    """Images (B, 3, S, S) as grid x grid patches (B, grid * grid, 3 (S / grid)^2), channel by channel.

    ``F.unfold`` computes the same, but launches one kernel per image on CUDA.
    """
    side = images.shape[-1] // grid
    cut = images.unflatten(3, (grid, side)).unflatten(2, (grid, side))
    patches: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches
