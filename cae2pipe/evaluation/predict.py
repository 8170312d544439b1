"""A classifier's predictions for every image of a split, divided among processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cae2pipe.errors import SourceError
from cae2pipe.evaluation.crop_batches import crop_batches
from cae2pipe.evaluation.crops import CentralCrop
from cae2pipe.evaluation.datasets import Split, common_labels
from cae2pipe.evaluation.scores import Predictions, as_predictions, joined_predictions, most_likely
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.world import World
from cae2pipe.supervised.remedies import batch_remedy


@dataclass(frozen=True)
class SplitPredictions:
    """Predictions in the split's order, and the images that could not be decoded."""

    predictions: Predictions
    rejected: list[dict[str, Any]]


def predict(
    logits: Callable[[Tensor], Tensor],
    split: Split,
    classes: list[str],
    *,
    crop: CentralCrop,
    workers: int,
    world: World,
) -> SplitPredictions:
    """Predictions of ``logits``, a function of pixels uint8 (B, 3, S, S) on the device with outputs for ``classes``.
    All processes get the same result.

    Raises:
        SourceError: no image can be decoded, or a file cannot be read. DamageError: a shard has changed.
        OutOfMemoryError: a batch does not fit the device.
    """
    own = range(world.rank, len(split.runs), world.ranks)
    outputs: dict[int, tuple[tuple[Tensor, Tensor], Tensor, list[str]]] = {}
    rejected: dict[int, list[dict[str, Any]]] = {}
    with memory_advice(f"a pass over {split.batch} images", batch_remedy(split.batch), split.root):
        for run, batch in zip(own, crop_batches(split, own, crop, workers=workers, device=world.device), strict=True):
            crops = batch.crops
            rejected[run] = crops.rejected
            if len(crops.labels):
                labels = common_labels(torch.from_numpy(crops.labels), split.classes, classes)
                outputs[run] = most_likely(logits(batch.pixels)), labels, crops.keys
    # At the end, since each copy would have waited for the device.
    parts = {run: as_predictions(*each) for run, each in outputs.items()}
    for theirs, rejects in world.gather((parts, rejected)):
        parts |= theirs
        rejected |= rejects
    if not parts:
        raise SourceError("no image here can be decoded", where=split.root, fix="check the folder")
    whole = joined_predictions([parts[run] for run in sorted(parts)])
    return SplitPredictions(whole, [reject for run in sorted(rejected) for reject in rejected[run]])
