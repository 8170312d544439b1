"""Latent alignment: the distance of the student's tokens from the teacher's (paper, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.config.pretrain import LossSettings
from cae2pipe.models.layers import gather_tokens


@dataclass(frozen=True)
class Prediction:
    """Predicted latents: class_token (B, 1, D), visible (B, V, D), masked (B, M, D) or None without a regressor.

    ``extra`` (B, n): an additional loss of the method per token, whose mean is added unweighted. ``summary`` (B, 1, W):
    of the whole image, where that is a target (``Method.summarise``).
    """

    class_token: Tensor
    visible: Tensor
    masked: Tensor | None
    extra: Tensor | None = None
    summary: Tensor | None = None


Distances = tuple[Tensor, Tensor | None]
"""Of all visible tokens (B, L), class token and summary included, and of the masked ones (B, M), None without a
prediction."""


@dataclass(frozen=True)
class LossTerms:
    """Scalars: the loss, and the mean distance of visible and of masked tokens before weighting. ``distances``: what
    they are means of."""

    total: Tensor
    visible: Tensor
    masked: Tensor
    distances: Distances


def token_distance(kind: str, prediction: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    """Distance of every token, (B, L, D) twice to (B, L), in float32 (paper, Table 3).

    ``cosine``: 1 - cos. ``mse`` and ``smooth_l1``: means over the channels; ``beta`` is where the latter turns linear.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    if kind == "mse":
        return F.mse_loss(prediction, target, reduction="none").mean(dim=-1)
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(dim=-1)


def weighted_mean(values: Tensor, weights: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of values (B, L) over the samples that count, weights (B,). Values of padding are ignored, even NaN. Their
    gradient is zero if they are finite, as they are for the zeros that the loader pads with.
    ``real``: the number of samples that count in the whole batch, if these are a part of it: the sum over parts is then
    the batch's mean. Default: the number in ``weights``.
    """
    kept = values.masked_fill((weights == 0).unsqueeze(1), 0)
    return (kept.mean(dim=1) * weights).sum() / (weights.sum() if real is None else real).clamp_min(1)


def alignment_loss(
    prediction: Prediction,
    target: Tensor,
    visible: Tensor,
    masked: Tensor,
    *,
    settings: LossSettings,
    weights: Tensor,
    has_class_token: bool,
    summary: Tensor | None = None,
    real: Tensor | None = None,
) -> LossTerms:
    """Visible plus masked alignment.

    Args:
        prediction: the student's latents.
        target: (B, 1 + P, D) with the class token first, or (B, P, D) where the teacher has none.
        visible, masked: (B, V) and (B, M) patch indices.
        settings: distance, reduction and weights. ``two_means`` is the paper's sum of two means; ``one_mean`` the
        released code's mean over all tokens. By default the class token counts as visible, with both: equation 2 has
        patches alone, but then no loss would reach the token that linear probes read, since the regressor does not see
        it. It is one of 168, 148, 99 and 79 visible tokens (Tiny to Large). weights: (B,), 0 for padding.
        has_class_token: whether the target's first token is a class token.
        summary: (B, 1, W), a target of its own width that counts as one more visible token.
        real: as in ``weighted_mean``.
    """
    seen, hidden = token_losses(
        prediction, target, visible, masked=masked, settings=settings, has_class_token=has_class_token, summary=summary
    )
    return combined(seen, hidden, settings=settings, weights=weights, extra=prediction.extra, real=real)


def token_losses(
    prediction: Prediction,
    target: Tensor,
    visible: Tensor,
    masked: Tensor,
    *,
    settings: LossSettings,
    has_class_token: bool,
    summary: Tensor | None = None,
) -> Distances:
    """The distances of all tokens. The class token is among those that ``settings.class_token`` names. Arguments as of
    ``alignment_loss``."""
    if settings.target == "layer_norm":
        target = F.layer_norm(target, target.shape[-1:])
        summary = None if summary is None else F.layer_norm(summary, summary.shape[-1:])
    patches = target[:, 1:] if has_class_token else target
    counted = settings.class_token if has_class_token else "none"

    def distance(group: str, predicted: Tensor, indices: Tensor) -> Tensor:
        wanted = gather_tokens(patches, indices)
        if group == counted:
            predicted = torch.cat([prediction.class_token, predicted], dim=1)
            wanted = torch.cat([target[:, :1], wanted], dim=1)
        return token_distance(settings.kind, predicted, wanted, beta=settings.beta)

    distances = distance("visible", prediction.visible, visible)
    if summary is not None:
        assert prediction.summary is not None, "build_method has given the method a head for it"
        pooled = token_distance(settings.kind, prediction.summary, summary, beta=settings.beta)
        distances = torch.cat([pooled, distances], dim=1)
    if prediction.masked is None:
        return distances, None
    return distances, distance("masked", prediction.masked, masked)


def combined(
    seen: Tensor,
    hidden: Tensor | None,
    *,
    settings: LossSettings,
    weights: Tensor,
    extra: Tensor | None = None,
    real: Tensor | None = None,
) -> LossTerms:
    """The loss from distances as ``token_losses`` gives them, and the method's ``extra`` one."""
    visible_loss = weighted_mean(seen, weights, real)
    if hidden is None:
        return LossTerms(settings.visible * visible_loss, visible_loss, torch.zeros_like(visible_loss), (seen, hidden))
    masked_loss = weighted_mean(hidden, weights, real)
    share_visible, share_masked = shares(seen, hidden, settings)
    total = settings.visible * share_visible * visible_loss + settings.masked * share_masked * masked_loss
    if extra is not None:
        total = total + weighted_mean(extra, weights, real)
    return LossTerms(total, visible_loss, masked_loss, (seen, hidden))


def shares(seen: Tensor, hidden: Tensor, settings: LossSettings) -> tuple[float, float]:
    """What the means of visible and masked tokens are multiplied with, besides their weights."""
    if settings.reduction == "two_means":
        return 1.0, 1.0
    count = seen.shape[1] + hidden.shape[1]
    return seen.shape[1] / count, hidden.shape[1] / count


def sample_losses(seen: Tensor, hidden: Tensor | None, settings: LossSettings) -> Tensor:
    """The loss of every sample (B,), whose mean is that of ``combined``."""
    if hidden is None:
        return settings.visible * seen.mean(dim=1)
    share_visible, share_masked = shares(seen, hidden, settings)
    total: Tensor = settings.visible * share_visible * seen.mean(dim=1)
    return total + settings.masked * share_masked * hidden.mean(dim=1)


def by_teacher(prediction: Prediction, widths: Sequence[int], summaries: Sequence[int | None]) -> list[Prediction]:
    """A prediction of the teachers' latents side by side, split into one for each, without ``extra``.

    Args:
        widths: of their latents. summaries: of their summaries, None where it is no target.
    """

    if len(widths) == 1:
        return [replace(prediction, extra=None)]

    def parts(tokens: Tensor | None) -> list[Tensor | None]:
        return [None] * len(widths) if tokens is None else list(tokens.split(list(widths), dim=-1))

    own = [width for width in summaries if width is not None]
    pooled = iter(() if prediction.summary is None else prediction.summary.split(own, dim=-1))
    columns = zip(parts(prediction.class_token), parts(prediction.visible), parts(prediction.masked), strict=True)
    result = []
    for number, (class_token, visible, masked) in enumerate(columns):
        assert class_token is not None
        assert visible is not None
        summary = None if summaries[number] is None else next(pooled)
        result.append(Prediction(class_token, visible, masked, None, summary))
    return result


def centred_cosine(
    prediction: Prediction,
    target: Tensor,
    visible: Tensor,
    masked: Tensor,
    *,
    mean: Tensor,
    weights: Tensor,
    has_class_token: bool,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cosine of predicted and true unit patch tokens after subtracting the set's mean unit token (D,): visible,
    masked.

    Predicting the mean everywhere scores about 0.5 raw and 0 here.
    """
    patches = target[:, 1:] if has_class_token else target

    def score(predicted: Tensor, indices: Tensor) -> Tensor:
        true = F.normalize(gather_tokens(patches, indices).float(), dim=-1)
        got = F.normalize(predicted.float(), dim=-1)
        return weighted_mean(F.cosine_similarity(got - mean, true - mean, dim=-1), weights, real)

    seen = score(prediction.visible, visible)
    return seen, torch.zeros_like(seen) if prediction.masked is None else score(prediction.masked, masked)
