"""Agreement of predicted label maps with the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cae2pipe.dense.upernet import IGNORED


def pixel_confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Numbers of pixels by true (row) and predicted class (column), int64 (C, C), for label maps of equal shape."""
    counted = labels != IGNORED
    cells = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def segmentation_scores(confusion: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """``miou``, ``pixel_accuracy``, ``mean_accuracy`` and ``per_class``, the IoU of every class that occurs. A class
    occurs if it has a pixel in the truth or in the predictions; accuracies are over classes in the truth.
    """
    counts = confusion.double().cpu()
    right, truth, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    union = truth + predicted - right
    present = union > 0
    iou = right / union.clamp(min=1)
    known = truth > 0
    return {
        "miou": float(iou[present].mean()),
        "pixel_accuracy": float(right.sum() / truth.sum().clamp(min=1)),
        "mean_accuracy": float((right[known] / truth[known]).mean()),
        "per_class": {name: float(iou[n]) for n, name in enumerate(names) if present[n]},
    }
