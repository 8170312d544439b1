"""Crops of a split on the device, run by run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from cae2pipe.evaluation.crops import Crop
from cae2pipe.evaluation.datasets import CropReader, Crops, Split
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.upload import pinned, uploaded
from cae2pipe.runtime.workers import in_order

CPU_BATCH, CUDA_BATCH = 64, 256
"""Default number of images per forward pass: with fewer, a CUDA device is partly idle."""


def batch_for(setting: int | None, device: torch.device) -> int:
    """Images per forward pass of an encoder, from the setting ``speed.batch``."""
    return setting or (CUDA_BATCH if device.type == "cuda" else CPU_BATCH)


@dataclass(frozen=True)
class CropBatch:
    """The crops of a run: ``pixels`` uint8 (b, 3, S, S) on the device; ``crops`` as read."""

    pixels: Tensor
    crops: Crops

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, pixels=change(self.pixels))


def crop_batches(
    split: Split, runs: Sequence[int], crop: Crop, *, workers: int, device: torch.device
) -> Iterator[CropBatch]:
    """Crops of the split's ``runs``, in order, from ``workers`` processes (see ``speed.workers``).

    Raises:
        SourceError, DamageError: as ``CropReader``. torch.OutOfMemoryError: two batches do not fit the device.
    """
    reader = CropReader(split, runs, crop)
    read = in_order(reader, min(worker_count(workers), len(reader)), preload=[CropReader.__module__])
    batches = (CropBatch(torch.from_numpy(crops.pixels).permute(0, 3, 1, 2), crops) for crops in read)
    return uploaded(pinned(batches, device), device)
