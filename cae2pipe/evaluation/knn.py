"""Weighted k-nearest-neighbour classification of frozen features, as in DINO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.evaluation.scores import accuracy, as_predictions, ranked
from cae2pipe.runtime.device import exact_float32


def knn_predictions(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    classes: int,
    k: Sequence[int],
    temperature: float,
    chunk: int = 256,
) -> dict[int, tuple[Tensor, Tensor]]:
    """For every k the classes with most votes, best first, and their shares of the votes.

    Cosines are computed in float32 regardless of autocast and TF32.

    Args:
        train, test: features (N, D) and (M, D), which this function normalises.
        train_labels: int64 (N,).
        classes: number of classes.
        k: numbers of neighbours; those above N count as N.
        temperature: a neighbour with cosine c votes with exp(c / temperature).
        chunk: test features per matrix product.

    Returns:
        int64 and float32 (M, up to 5), on the CPU. -1 stands for no prediction: classes without votes are not ranked,
        since their order would depend on the device.
    """
    most = min(max(k), len(train))
    rankings: dict[int, list[tuple[Tensor, Tensor]]] = {count: [] for count in k}
    with exact_float32(train.device):
        train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
        for low in range(0, len(test), chunk):
            similarity, neighbours = (test[low : low + chunk] @ train.T).topk(most, dim=1)
            labels = train_labels[neighbours]
            # Only ratios matter, and exp(1 / temperature) overflows below 0.012.
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
            for count in k:
                votes = torch.zeros(len(labels), classes, device=train.device)
                votes.scatter_add_(1, labels[:, :count], weights[:, :count])
                best, share = ranked(votes / votes.sum(dim=1, keepdim=True))
                rankings[count].append((best.masked_fill(share <= 0, -1).cpu(), share.cpu()))
    return {
        count: (torch.cat([best for best, _ in parts]), torch.cat([share for _, share in parts]))
        for count, parts in rankings.items()
    }


def knn_top1(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, classes: int, k: int, temperature: float
) -> float:
    """Top-1 accuracy of ``knn_predictions`` with one number of neighbours; labels int64 (N,) and (M,)."""
    nearest = knn_predictions(train, train_labels, test, classes=classes, k=[k], temperature=temperature)
    best, share = nearest[k]
    return accuracy(as_predictions((best, share), test_labels, []))["top1"]
