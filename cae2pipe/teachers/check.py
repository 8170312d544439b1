"""Checks of a teacher's latents."""

from __future__ import annotations

import torch
from torch import Tensor

from cae2pipe.errors import TeacherError

SMALLEST_SPREAD = 1e-4
"""Spread of tokens around their mean, relative to their norm, below which a teacher's latents are useless."""


def check_features(tokens: Tensor, where: object, constant: bool = False) -> None:
    """Refuse latents (B, T, D) that are not finite or, with ``constant``, hardly differ.

    Raises:
        TeacherError: describes the latents.
    """
    if not bool(torch.isfinite(tokens).all()):
        count = int((~torch.isfinite(tokens)).sum())
        raise TeacherError(
            f"the teacher's latents are not finite ({count} of {tokens.numel()} values)",
            where=where,
            fix="check its weights; in fp16, try --set teacher.precision=bf16 or fp32",
        )
    if not constant:
        return
    for what, axis in (("patches of an image", 1), ("images", 0)):
        if tokens.shape[axis] == 1:
            continue
        spread = (tokens - tokens.mean(dim=axis, keepdim=True)).norm(dim=-1).mean()
        size = tokens.norm(dim=-1).mean()
        if float(spread) <= SMALLEST_SPREAD * float(size) or float(size) == 0:
            raise TeacherError(
                f"the teacher's latents hardly differ between {what} "
                f"(spread {float(spread):.2g}, norm {float(size):.2g})",
                where=where,
                fix="check that the weights are those of a trained model and belong to this architecture",
            )
