"""The linear probe: BatchNorm without affine and one linear layer, trained with LARS (paper, Table 9)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.evaluate import LinearSettings
from cae2pipe.errors import DivergedError, SourceError
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

    Returns:
        ``top1`` and ``top5``; ``losses``, the mean training loss of every epoch, and ``train_loss``, the last of them.

    Raises:
        SourceError: a single training image. DivergedError: the loss is not finite.
    """
    from timm.optim import Lars

    if len(train) < 2:
        raise SourceError("a linear probe needs at least two training images", fix="give more, or use `evaluate knn`")
    batch, steps = batch_and_steps(len(train), settings.batch)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    probe = Probe(train.shape[1], classes).to(train.device).train()
    # Without weight decay timm's Lars is plain SGD unless told to adapt; the bias is not adapted. LARS makes a step
    # relative to the weights' norm, so a smaller batch calls for no smaller rate: with it, small sets would not train.
    optimizer = Lars(
        [
            {"params": [probe.head.weight], "always_adapt": True, "peak": settings.lr * settings.batch / 256},
            {"params": [probe.head.bias], "always_adapt": False, "peak": settings.lr * batch / 256},
        ],
        lr=0.0,
        momentum=settings.momentum,
        weight_decay=0.0,
        trust_coeff=0.001,
    )
    report.total(settings.epochs, "epochs")
    losses: list[float] = []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(train), generator=generator).to(train.device)
        total = torch.zeros((), device=train.device)
        for number, chosen in enumerate(order.tensor_split(steps)):
            step = epoch * steps + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings.epochs, settings.warmup_epochs, group["peak"], 0.0)
            loss = F.cross_entropy(probe(train[chosen]), train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        losses.append(float(total) / len(train))
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"the probe's loss is not finite in epoch {epoch}", where="lr", fix="lower lr")
        report.advance(1, loss=losses[-1])
    return {**score(probe, test, test_labels, classes), "train_loss": losses[-1], "losses": losses}


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
