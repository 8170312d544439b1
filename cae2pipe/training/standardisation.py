"""PHI-S: targets of several teachers of which none drowns the others, for losses that depend on lengths.

Source: Ranzinger et al., 2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation". The mean is
subtracted, and the principal components are rotated so that all dimensions have the same variance and divided by its
root. The paper rotates by a Hadamard matrix, which does not exist for every width; here it is a product of D - 1 Givens
rotations, each of which gives one dimension the mean variance (Schur and Horn).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cae2pipe.config.pretrain import LossSettings
from cae2pipe.targets.calibration import one_thread, principal_axes
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.store_layout import PATCHES, arrays_of
from cae2pipe.targets.target_set import TargetSet

BLOCKS = 16
"""First blocks of 64 views from which the statistics are taken."""


class Standardisation(NamedTuple):
    """``mean`` (D,) is subtracted, then ``matrix`` (D, D) applied from the right; float32."""

    mean: Tensor
    matrix: Tensor


def standardises(loss: LossSettings) -> bool:
    """Whether the targets of several teachers need it: lengths count, and tokens are not normalised one by one."""
    return loss.kind != "cosine" and loss.target == "as_is"


def equal_variance_rotation(variances: Tensor) -> Tensor:
    """An orthogonal matrix (D, D) float64: independent components with these variances (D,), times it from the right,
    have equal variances."""
    left = variances.double().clone()
    rotation = torch.eye(len(left), dtype=torch.float64)
    mean, open_ = float(left.mean()), list(range(len(left)))
    while len(open_) > 1:
        low, high = min(open_, key=lambda i: float(left[i])), max(open_, key=lambda i: float(left[i]))
        span = float(left[high] - left[low])
        if span <= 0:
            break
        share = min(1.0, max(0.0, (mean - float(left[low])) / span))
        cosine, sine = (1 - share) ** 0.5, share**0.5
        # Those not yet done are uncorrelated with each other, so one rotation gives `low` the mean variance.
        one, two = rotation[:, low].clone(), rotation[:, high].clone()
        rotation[:, low], rotation[:, high] = cosine * one + sine * two, cosine * two - sine * one
        left[high] = left[low] + left[high] - mean
        open_.remove(low)
    return rotation


def standardisation_of(tokens: Tensor) -> Standardisation:
    """From a sample of tokens (n, T, D) float32. Computed with one thread, so that it can be reproduced."""
    with one_thread():
        mean, basis = principal_axes(tokens)
        flat = tokens.reshape(-1, tokens.shape[-1]).double() - mean
        variances = (flat @ basis).square().mean(dim=0)
        spread = variances.mean().sqrt().clamp_min(1e-12)
        matrix = basis @ equal_variance_rotation(variances) / spread
        return Standardisation(mean.float(), matrix.float())


def stored_standardisation(
    targets: TargetSet, group: str = PATCHES, stores: Sequence[str] | None = None
) -> Standardisation:
    """That of a group of a set, from the tokens of the first ``BLOCKS`` blocks of ``stores`` (default: all)."""
    tokens: list[Tensor] = []
    for name in sorted(targets.stores) if stores is None else stores:
        reader = targets.reader(name, [group])
        for block in range(min(reader.blocks, BLOCKS - len(tokens))):
            arrays = as_tensors(arrays_of(group, reader.arrays(block)))
            unit = targets.groups[group].layout.codec.decode(arrays)
            tokens.append(unit * arrays["norms"].float().unsqueeze(-1))
        if len(tokens) == BLOCKS:
            break
    return standardisation_of(torch.cat(tokens))
