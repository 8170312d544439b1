"""From ranked classes to accuracies, stored predictions and a picture of the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import replacing, write_bytes
from cae2pipe.artifacts.digest import file_entry

MOST = 5
"""Number of ranks that are kept."""
PREDICTIONS, CONFUSION = "predictions.npz", "confusion.png"


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images: the r highest-ranked classes, best first, int64 (N, r); the confidence in each, float32
    (N, r); labels int64 (N,); keys. A class of -1 is no prediction."""

    ranked: np.ndarray
    confidence: np.ndarray
    labels: np.ndarray
    keys: list[str]


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The r highest-ranked classes of scores (B, classes), and their scores, each (B, r)."""
    best = scores.topk(min(MOST, scores.shape[1]), dim=1)
    return best.indices, best.values


def joined_predictions(parts: Sequence[Predictions]) -> Predictions:
    """The parts concatenated."""
    return Predictions(
        np.concatenate([part.ranked for part in parts]),
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [key for part in parts for key in part.keys],
    )


def accuracy(predictions: Predictions) -> dict[str, float]:
    """Top-1 and top-5 accuracy."""
    hits = predictions.ranked == predictions.labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}


def per_class(predictions: Predictions, classes: Sequence[str]) -> dict[str, float]:
    """Top-1 accuracy by class, for classes with images."""
    hits = predictions.ranked[:, 0] == predictions.labels
    totals = np.bincount(predictions.labels, minlength=len(classes))
    right = np.bincount(predictions.labels[hits], minlength=len(classes))
    return {name: float(right[n] / totals[n]) for n, name in enumerate(classes) if totals[n]}


def confusion(predictions: Predictions, classes: int) -> np.ndarray:
    """Numbers of images by true class (row) and predicted class (column), int64 (classes, classes)."""
    first = predictions.ranked[:, 0]
    some = first >= 0
    cells = np.bincount(predictions.labels[some] * classes + first[some], minlength=classes * classes)
    return cells.reshape(classes, classes)


def write_predictions(root: Path, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Write ``predictions.npz`` and ``confusion.png``; returns their manifest entries."""
    from cae2pipe.reporting.confusion import draw_confusion
    from cae2pipe.reporting.pictures import png_bytes

    names = np.array(predictions.keys, dtype=np.str_)
    with replacing(root / PREDICTIONS) as temporary, temporary.open("wb") as file:
        # numpy writes no timestamps into its archives, so equal predictions give equal bytes.
        np.savez_compressed(
            file,
            ranked=predictions.ranked,
            confidence=predictions.confidence,
            labels=predictions.labels,
            keys=names,
            classes=np.array(list(classes), dtype=np.str_),
        )
    write_bytes(root / CONFUSION, png_bytes(draw_confusion(confusion(predictions, len(classes)), classes)))
    return {name: file_entry(root / name) for name in (PREDICTIONS, CONFUSION)}


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``ranked`` of the softmax of logits (B, classes), on their device."""
    return ranked(torch.softmax(logits.float(), dim=1))


def as_predictions(ranking: tuple[Tensor, Tensor], labels: Tensor, keys: list[str]) -> Predictions:
    """Predictions on the host from the result of ``ranked`` or ``most_likely``."""
    best, sure = ranking
    return Predictions(best.cpu().numpy(), sure.cpu().numpy(), labels.cpu().numpy(), keys)


def from_scores(scores: Tensor, labels: Tensor, keys: list[str]) -> Predictions:
    """Predictions from logits (N, classes): the confidence is the softmax."""
    return as_predictions(most_likely(scores), labels, keys)
