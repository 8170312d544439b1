"""Weighted nearest neighbours, as DINO scores frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    k: Sequence[int],
    temperature: float,
    chunk: int = 256,
) -> dict[int, dict[str, float]]:
    """Top-1 and top-5 accuracy for every number of neighbours.

    Args:
        train, test: features (N, D) and (M, D); normalised here.
        train_labels, test_labels: int64 (N,) and (M,).
        classes: number of classes.
        k: numbers of neighbours; those above N count as N.
        temperature: a neighbour with cosine c votes with exp(c / temperature).
        chunk: test features at a time.

    A class that no neighbour votes for is no prediction, so top-5 can hold fewer than five classes: ranking them by
    chance would count hits that depend on the device.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    most = min(max(k), len(train))
    hits = {count: torch.zeros(2) for count in k}
    for low in range(0, len(test), chunk):
        similarity, neighbours = (test[low : low + chunk] @ train.T).topk(most, dim=1)
        labels = train_labels[neighbours]
        # Only ratios matter, and exp(1 / temperature) overflows below 0.012.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        truth = test_labels[low : low + chunk, None]
        for count in k:
            votes = torch.zeros(len(labels), classes, device=train.device)
            votes.scatter_add_(1, labels[:, :count], weights[:, :count])
            most_votes = votes.topk(min(5, classes), dim=1)
            ranked = (most_votes.indices == truth) & (most_votes.values > 0)
            hits[count] += torch.stack([ranked[:, :1].sum(), ranked.sum()]).cpu()
    return {count: {"top1": float(h[0]) / len(test), "top5": float(h[1]) / len(test)} for count, h in hits.items()}
