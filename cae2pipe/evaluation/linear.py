"""The linear probe: BatchNorm without affine and one linear layer, trained with LARS (paper, Table 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.evaluate import LinearSettings
from cae2pipe.errors import DivergedError, SourceError
from cae2pipe.evaluation.chunk_norm import ChunkNorm
from cae2pipe.models.truncated_normal import truncated_normal
from cae2pipe.runtime.device import exact_float32
from cae2pipe.runtime.keyed import keyed_permutation
from cae2pipe.runtime.progress import Report
from cae2pipe.training.schedule import learning_rate

SMALL_SET_STEPS, SMALL_SET_BATCH = 16, 64
"""Below this number of steps per epoch the batch is reduced, down to this size: LARS needs hundreds of steps to
converge, and BatchNorm dozens of samples."""


class Probe(nn.Module):
    """Features (B, D) to logits (B, classes)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = ChunkNorm(dim)
        self.head = nn.Linear(dim, classes)
        truncated_normal(self.head.weight, std=0.01, cut=2)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits


def train_probe(
    crops: Sequence[Tensor], labels: Tensor, *, classes: int, settings: LinearSettings, report: Report
) -> tuple[Probe, dict[str, Any]]:
    """Train on fixed features, one (N, D) per cached crop, in float32. Equal seeds give equal results.

    With ``settings.sweep`` the learning rate is the one that is best on held-out training images; test images are not
    used for that.

    Returns:
        The probe, and ``lr``; ``losses``, the mean training loss of every epoch; ``train_loss``, the last of them;
        after a sweep ``held_out``, the held-out accuracy of every rate.

    Raises:
        SourceError: there is only one training image, or too few for a held-out set. DivergedError: the loss is not
        finite.
    """
    rate, more = settings.lr, {}
    with exact_float32(labels.device):
        if settings.sweep:
            accuracies = sweep(crops, labels, classes=classes, settings=settings, report=report)
            # Of equal ones the smallest, which is least likely to diverge.
            rate = min(accuracies, key=lambda lr: (-accuracies[lr], lr))
            more = {"held_out": {f"{lr:g}": score for lr, score in accuracies.items()}}
            report.log(
                f"lr {rate:g} is the best of {len(accuracies)}: {accuracies[rate]:.4f} on held-out training images"
            )
        probes, losses = fit(crops, labels, classes=classes, settings=settings, rates=[rate], report=report)
    broken = next((epoch for epoch, loss in enumerate(losses[0]) if not math.isfinite(loss)), None)
    if broken is not None:
        raise DivergedError(f"the probe's loss is not finite in epoch {broken}", where="lr", fix="lower lr")
    return probes[0].eval(), {"lr": rate, "train_loss": losses[0][-1], "losses": losses[0], **more}


def sweep(
    crops: Sequence[Tensor], labels: Tensor, *, classes: int, settings: LinearSettings, report: Report
) -> dict[float, float]:
    """Top-1 accuracy on the first crops of held-out training images for every learning rate. All are trained together
    on the other images."""
    held = held_out(labels, settings.held_out, settings.seed)
    if not held.any() or int((~held).sum()) < 2:
        raise SourceError(
            f"{len(labels)} training images are too few to hold {settings.held_out:g} of each class out",
            fix="add images, raise held_out, or omit the sweep",
        )
    rates = list(dict.fromkeys(settings.sweep))
    others = [features[~held] for features in crops]
    probes, losses = fit(others, labels[~held], classes=classes, settings=settings, rates=rates, report=report)
    tested, truth = crops[0][held], labels[held]
    return {
        rate: float((logits(probe, tested).argmax(1) == truth).float().mean()) if math.isfinite(loss[-1]) else 0.0
        for rate, probe, loss in zip(rates, probes, losses, strict=True)
    }


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which of N images are held out, bool (N,): ``share`` of each class, drawn by the seed; never a whole class."""
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        order = torch.from_numpy(keyed_permutation(len(own), "held-out", seed, label)).to(own.device)
        held[own[order[: min(round(share * len(own)), len(own) - 1)]]] = True
    return held


def fit(
    crops: Sequence[Tensor],
    labels: Tensor,
    *,
    classes: int,
    settings: LinearSettings,
    rates: Sequence[float],
    report: Report,
) -> tuple[list[Probe], list[list[float]]]:
    """One probe per learning rate, all trained on the same batches, and the loss of each by epoch."""
    images, dim = crops[0].shape
    if images < 2:
        raise SourceError("a linear probe needs at least two training images", fix="give more, or use `evaluate knn`")
    batch, steps = batch_and_steps(images, settings.batch)
    generator = torch.Generator().manual_seed(settings.seed)
    probes: list[Probe] = []
    groups: list[dict[str, Any]] = []
    for lr in rates:
        torch.manual_seed(settings.seed)
        probes.append(Probe(dim, classes).to(labels.device).train())
        groups += lars_groups(probes[-1], lr, settings.batch, taken=batch)
    optimizer = lars(groups, settings.momentum)
    report.phase("training the probe" if len(rates) == 1 else f"training probes at {len(rates)} learning rates")
    report.total(settings.epochs, "epochs")
    losses: list[list[float]] = []
    for epoch in range(settings.epochs):
        features = crops[epoch % len(crops)]
        order = torch.randperm(images, generator=generator).to(labels.device)
        total = torch.zeros(len(probes), device=labels.device)
        for number, chosen in enumerate(order.tensor_split(steps)):
            step = epoch * steps + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, steps, settings.epochs, warmup_epochs=settings.warmup_epochs, lr=group["peak"], min_lr=0.0
                )
            seen, truth = features[chosen], labels[chosen]
            loss = torch.stack([F.cross_entropy(probe(seen), truth) for probe in probes])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            for probe in probes:
                probe.norm.update_running_stats()
            total += loss.detach() * len(chosen)
        losses.append((total / images).tolist())
        report.advance(1, loss=min(losses[-1]))
        if not any(map(math.isfinite, losses[-1])):
            break
    return probes, [list(own) for own in zip(*losses, strict=True)]


def lars_groups(probe: Probe, lr: float, batch: int, *, taken: int) -> list[dict[str, Any]]:
    """LARS's parameter groups of a probe. ``lr`` refers to a batch of 256, ``batch`` is the setting, ``taken`` the
    actual batch.

    Without weight decay timm's Lars is plain SGD unless adaptation is forced; the bias is not adapted. LARS steps are
    relative to the norm of the weights, so a smaller batch does not need a smaller rate; with one, small sets would not
    train.
    """
    return [
        {"params": [probe.head.weight], "always_adapt": True, "peak": lr * batch / 256},
        {"params": [probe.head.bias], "always_adapt": False, "peak": lr * taken / 256},
    ]


def lars(groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
    """timm's LARS without weight decay. The caller sets the rates."""
    from timm.optim import Lars

    optimizer: torch.optim.Optimizer = Lars(groups, lr=0.0, momentum=momentum, weight_decay=0.0, trust_coeff=0.001)
    return optimizer


def batch_and_steps(images: int, batch: int) -> tuple[int, int]:
    """The batch for a set of at least two images, and the steps per epoch; no step has fewer than two images."""
    batch = min(batch, images, max(math.ceil(images / SMALL_SET_STEPS), SMALL_SET_BATCH))
    return batch, min(math.ceil(images / batch), images // 2)


@torch.no_grad()
def logits(probe: Probe, features: Tensor) -> Tensor:
    """Logits (N, classes) of features (N, D), in float32."""
    with exact_float32(features.device):
        outputs: Tensor = probe.eval()(features)
        return outputs
