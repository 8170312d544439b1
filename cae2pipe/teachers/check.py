"""Checks of a teacher's latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.protocol import TeacherInfo, TeacherOutput

SMALLEST_SPREAD = 1e-4
"""Spread of tokens around their mean, relative to their norm, below which a teacher's latents are useless."""


def check_output(
    output: TeacherOutput, info: TeacherInfo, keys: Sequence[str], where: object, *, constant: bool = False
) -> None:
    """``check_features`` of everything that a teacher gives, in the order in which it is computed, so that the tensor
    named is the first that is wrong. ``keys``: of the images.

    Raises:
        TeacherError: names the tensor, the first image and the fix.
    """
    fix = FP16_FIX if info.precision == "fp16" else f"check its weights; they were used in {info.precision}"
    for what, tensor in outputs(output, info.class_token):
        check_finite(tensor, where, what=what, keys=keys, fix=fix)
    if not constant:
        return
    for number, tokens in output.layers.items():
        check_features(tokens, f"{where}, layer {number}", constant=True)
    check_features(output.tokens, where, constant=True)
    if output.summary is not None:
        check_features(output.summary.unsqueeze(1), f"{where}, summary", constant=True)


def outputs(output: TeacherOutput, class_token: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each part of a teacher's output, in the order in which they are computed."""
    for number in sorted(output.layers):
        yield f"tokens of layer {number}", output.layers[number]
    if output.attention is not None:
        yield "attention", output.attention
    if class_token:
        yield "class token", output.tokens[:, :1]
    yield "patch tokens", output.tokens[:, int(class_token) :]
    if output.summary is not None:
        yield "summary", output.summary


FP16_FIX = "--set teacher.precision=bf16, since fp16 overflows above 65504 and bf16 does not; else check its weights"


def check_finite(
    values: Tensor, where: object, *, what: str = "latents", keys: Sequence[str] = (), fix: str = FP16_FIX
) -> None:
    """Refuse values (B, ...) that are not finite. ``keys``: of the B images.

    Raises:
        TeacherError: names the values (``what``), how many are not finite, and the first image that has one.
    """
    wrong = ~torch.isfinite(values)
    if not bool(wrong.any()):
        return
    image = int(wrong.flatten(1).any(dim=1).nonzero()[0, 0])
    infinite = int(torch.isinf(values).sum())
    raise TeacherError(
        f"the teacher's {what} {'is' if what in ('class token', 'attention', 'summary') else 'are'} not finite "
        f"({int(wrong.sum())} of {values.numel()} values, {infinite} of them infinite; first in image "
        f"{keys[image] if keys else image})",
        where=where,
        fix=fix,
    )


def check_features(tokens: Tensor, where: object, constant: bool = False) -> None:
    """Refuse latents (B, T, D) that are not finite or, with ``constant``, hardly differ.

    Raises:
        TeacherError: describes the latents.
    """
    check_finite(tokens, where)
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
