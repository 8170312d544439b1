"""The linear probe: BatchNorm without affine and one linear layer, trained with LARS (paper, Table 9)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.evaluate import LinearSettings
from cae2pipe.progress import Report
from cae2pipe.training.schedule import learning_rate

SMALL_SET_STEPS = 16
"""Steps an epoch below which the batch is made smaller: LARS needs some hundreds of steps to get anywhere."""


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
) -> dict[str, float]:
    """Train on (N, D) features and score on (M, D) ones: ``top1``, ``top5``, ``train_loss`` of the last epoch."""
    from timm.optim import Lars

    batch = min(settings.batch, max(1, math.ceil(len(train) / SMALL_SET_STEPS)))
    steps = math.ceil(len(train) / batch)
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    probe = Probe(train.shape[1], classes).to(train.device).train()
    # Without weight decay timm's Lars is plain SGD unless told to adapt; the bias is not adapted.
    optimizer = Lars(
        [
            {"params": [probe.head.weight], "always_adapt": True},
            {"params": [probe.head.bias], "always_adapt": False},
        ],
        lr=0.0,
        momentum=settings.momentum,
        weight_decay=0.0,
        trust_coeff=0.001,
    )
    peak = settings.lr * batch / 256
    report.total(settings.epochs, "epochs")
    loss = torch.zeros(())
    for epoch in range(settings.epochs):
        order = torch.randperm(len(train), generator=generator).to(train.device)
        total = 0.0
        for number, low in enumerate(range(0, len(train), batch)):
            chosen = order[low : low + batch]
            if len(chosen) == 1:  # BatchNorm has no variance of one sample
                continue
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    epoch * steps + number, steps, settings.epochs, settings.warmup_epochs, peak, 0.0
                )
            loss = F.cross_entropy(probe(train[chosen]), train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(chosen)
        mean_loss = total / len(train)
        report.advance(1, loss=mean_loss)
    return {**score(probe, test, test_labels, classes), "train_loss": mean_loss}


@torch.no_grad()
def score(probe: Probe, features: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Top-1 and top-5 accuracy of a probe."""
    ranked = probe.eval()(features).topk(min(5, classes), dim=1).indices == labels[:, None]
    return {"top1": float(ranked[:, 0].float().mean()), "top5": float(ranked.any(dim=1).float().mean())}
