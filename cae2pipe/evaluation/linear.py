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
from cae2pipe.keyed import keyed_permutation
from cae2pipe.progress import Report
from cae2pipe.training.schedule import learning_rate

SMALL_SET_STEPS, SMALL_SET_BATCH = 16, 64
"""Steps an epoch below which the batch is made smaller, and how small: LARS needs some hundreds of steps to get
anywhere, and BatchNorm some dozens of samples."""


class Probe(nn.Module):
    """Features (B, D) to logits (B, classes)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def train_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: LinearSettings,
    report: Report,
) -> dict[str, Any]:
    """Train on fixed features (N, D), without augmentation, and score on (M, D) ones. Equal seeds give equal results.

    With ``settings.sweep`` the learning rate is the one of those that is best on held-out training images; the test
    images have no part in it.

    Returns:
        ``top1`` and ``top5``; ``lr``; ``losses``, the mean training loss of every epoch, and ``train_loss``, the last
        of them; after a sweep ``held_out``, the accuracy there of every rate.

    Raises:
        SourceError: a single training image, or too few to hold some out. DivergedError: the loss is not finite.
    """
    rate, more = settings.lr, {}
    if settings.sweep:
        found = sweep(train, train_labels, classes=classes, settings=settings, report=report)
        # Of equals the smallest: it is the farthest from diverging.
        rate = min(found, key=lambda lr: (-found[lr], lr))
        more = {"held_out": {f"{lr:g}": score for lr, score in found.items()}}
        report.log(f"lr {rate:g} is the best of {len(found)}: {found[rate]:.4f} on held-out training images")
    probes, losses = fit(train, train_labels, classes=classes, settings=settings, rates=[rate], report=report)
    broken = next((epoch for epoch, loss in enumerate(losses[0]) if not math.isfinite(loss)), None)
    if broken is not None:
        raise DivergedError(f"the probe's loss is not finite in epoch {broken}", where="lr", fix="lower lr")
    found_scores = score(probes[0], test, test_labels, classes)
    return {**found_scores, "lr": rate, "train_loss": losses[0][-1], "losses": losses[0], **more}


def sweep(
    features: Tensor, labels: Tensor, *, classes: int, settings: LinearSettings, report: Report
) -> dict[float, float]:
    """Top-1 accuracy on held-out training images for every learning rate, all trained at once on the others."""
    held = held_out(labels, settings.held_out, settings.seed)
    if not held.any() or int((~held).sum()) < 2:
        raise SourceError(
            f"{len(labels)} training images are too few to hold {settings.held_out:g} of each class out",
            fix="give more, raise held_out, or leave the sweep out",
        )
    rates = list(dict.fromkeys(settings.sweep))
    probes, losses = fit(features[~held], labels[~held], classes=classes, settings=settings, rates=rates, report=report)
    return {
        rate: score(probe, features[held], labels[held], classes)["top1"] if math.isfinite(loss[-1]) else 0.0
        for rate, probe, loss in zip(rates, probes, losses, strict=True)
    }


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which of N images are held out, bool (N,): ``share`` of each class, drawn by the seed; never all of one."""
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        order = torch.from_numpy(keyed_permutation(len(own), "held-out", seed, label)).to(own.device)
        held[own[order[: min(round(share * len(own)), len(own) - 1)]]] = True
    return held


def fit(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    settings: LinearSettings,
    rates: Sequence[float],
    report: Report,
) -> tuple[list[Probe], list[list[float]]]:
    """A probe for each learning rate, trained side by side on the same batches, and each one's loss by epoch."""
    from timm.optim import Lars

    if len(features) < 2:
        raise SourceError("a linear probe needs at least two training images", fix="give more, or use `evaluate knn`")
    batch, steps = batch_and_steps(len(features), settings.batch)
    generator = torch.Generator().manual_seed(settings.seed)
    probes, groups = [], []
    for lr in rates:
        torch.manual_seed(settings.seed)
        probe = Probe(features.shape[1], classes).to(features.device).train()
        # Without weight decay timm's Lars is plain SGD unless told to adapt; the bias is not adapted. LARS makes a
        # step relative to the weights' norm, so a smaller batch calls for no smaller rate: with it, small sets would
        # not train.
        weight, bias = lr * settings.batch / 256, lr * batch / 256
        groups.append({"params": [probe.head.weight], "always_adapt": True, "peak": weight})
        groups.append({"params": [probe.head.bias], "always_adapt": False, "peak": bias})
        probes.append(probe)
    optimizer = Lars(groups, lr=0.0, momentum=settings.momentum, weight_decay=0.0, trust_coeff=0.001)
    report.total(settings.epochs, "epochs")
    losses: list[list[float]] = []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        total = torch.zeros(len(probes), device=features.device)
        for number, chosen in enumerate(order.tensor_split(steps)):
            step = epoch * steps + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings.epochs, settings.warmup_epochs, group["peak"], 0.0)
            images, truth = features[chosen], labels[chosen]
            loss = torch.stack([F.cross_entropy(probe(images), truth) for probe in probes])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        losses.append((total / len(features)).tolist())
        report.advance(1, loss=min(losses[-1]))
        if not any(map(math.isfinite, losses[-1])):
            break
    return probes, [list(own) for own in zip(*losses, strict=True)]


def batch_and_steps(images: int, batch: int) -> tuple[int, int]:
    """The batch for a set of at least two images, and the steps an epoch; no step has fewer than two images."""
    batch = min(batch, images, max(math.ceil(images / SMALL_SET_STEPS), SMALL_SET_BATCH))
    return batch, min(math.ceil(images / batch), images // 2)


@torch.no_grad()
def score(probe: Probe, features: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Top-1 and top-5 accuracy of a probe."""
    ranked = probe.eval()(features).topk(min(5, classes), dim=1).indices == labels[:, None]
    hits = {"top1": ranked[:, 0].sum(), "top5": ranked.sum()}
    return {name: int(count) / len(labels) for name, count in hits.items()}
