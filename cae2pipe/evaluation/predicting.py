"""A classifier's predictions for every image of a split, shared out among processes, each image once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cae2pipe.config.evaluate import EvaluateSpeed
from cae2pipe.errors import SourceError
from cae2pipe.evaluation.crops import CentralCrop
from cae2pipe.evaluation.datasets import CropReader, Split, common_labels
from cae2pipe.evaluation.scores import Predictions, from_scores, joined_predictions
from cae2pipe.loading.workers import in_order
from cae2pipe.processes import worker_count
from cae2pipe.training.parallel import World


@dataclass(frozen=True)
class Found:
    """Predictions in the split's order, and what could not be decoded."""

    predictions: Predictions
    rejected: list[dict[str, Any]]


def predict(
    logits: Callable[[Tensor], Tensor],
    split: Split,
    classes: list[str],
    crop: CentralCrop,
    speed: EvaluateSpeed,
    world: World,
) -> Found:
    """Predictions of ``logits``, which takes pixels uint8 (B, 3, S, S) on the device and knows ``classes``; the same in
    all processes.

    Raises:
        SourceError: not one image can be decoded, or a file cannot be read. DamageError: a shard has changed.
    """
    own = range(world.rank, len(split.runs), world.ranks)
    reader = CropReader(split, own, crop)
    parts: dict[int, Predictions] = {}
    rejected: dict[int, list[dict[str, Any]]] = {}
    for run, crops in zip(own, in_order(reader, min(worker_count(speed.workers), len(reader))), strict=True):
        rejected[run] = crops.rejected
        if len(crops.labels):
            pixels = torch.from_numpy(crops.pixels).permute(0, 3, 1, 2).to(world.device)
            labels = common_labels(torch.from_numpy(crops.labels), split.classes, classes)
            parts[run] = from_scores(logits(pixels), labels, crops.keys)
    for theirs, rejects in world.gather((parts, rejected)):
        parts |= theirs
        rejected |= rejects
    if not parts:
        raise SourceError("not one image here can be decoded", where=split.root, fix="check the folder")
    predictions = joined_predictions([parts[run] for run in sorted(parts)])
    return Found(predictions, [reject for run in sorted(rejected) for reject in rejected[run]])
