"""Central crops of labelled images, for one encoder after another: decoded once if they fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cae2pipe.config.evaluate import KnnSettings
from cae2pipe.evaluation.crop_batches import CropBatch, crop_batches
from cae2pipe.evaluation.crops import CentralCrop
from cae2pipe.evaluation.datasets import Split, common_labels, open_data
from cae2pipe.evaluation.encoders import FrozenEncoder
from cae2pipe.runtime.remembered import Memory, Remembered
from cae2pipe.runtime.world import World

CPU = torch.device("cpu")


class Labelled(NamedTuple):
    """Features (N, D) float32 and labels (N,) int64, on the CPU."""

    features: Tensor
    labels: Tensor


class LabelledCrops:
    """The images below ``data`` that this process encodes: every ``world.ranks``-th run of ``batch`` images.

    Args:
        size: side of the crops. memory: for decoded crops. workers: processes that decode.
        rejected: called with the path of each image that cannot be decoded and the reason, whenever it is read.

    Raises:
        SourceError, ManifestError: as ``open_data``.
    """

    def __init__(
        self,
        data: Path,
        *,
        size: int,
        batch: int,
        memory: Memory,
        workers: int,
        world: World,
        rejected: Callable[[Path, str], None],
    ):
        self.train, self.val = world.main_first(lambda: open_data(data, batch))
        self.world, self.rejected = world, rejected
        crop = CentralCrop(size, round(size / KnnSettings().features.crop))

        def read(split: Split) -> Iterator[CropBatch]:
            runs = range(world.rank, len(split.runs), world.ranks)
            return crop_batches(split, runs, crop, workers=workers, device=CPU) if runs else iter(())

        self.batches = {
            split.root: Remembered(partial(read, split), lambda item: item.pixels.nbytes, memory)
            for split in (self.train, self.val)
        }

    def features(self, split: Split, encode: Callable[[Tensor], Tensor]) -> list[Labelled]:
        """Features of this process's share of a split, run by run; labels are indices into train's classes.

        Args:
            encode: from crops, uint8 (b, 3, S, S) on the CPU, to features (b, D), also on another device.

        Raises:
            SourceError, DamageError: files cannot be read or have changed.
        """
        parts, labels = [], []
        for batch in self.batches[split.root]:
            for reject in batch.crops.rejected:
                self.rejected(split.root / reject["path"], reject["reason"])
            parts.append(encode(batch.pixels) if len(batch.pixels) else None)
            labels.append(common_labels(torch.from_numpy(batch.crops.labels), split.classes, self.train.classes))
        # Copied at the end, so that the device does not wait for each.
        return [
            Labelled(torch.zeros(0, 0) if part is None else part.float().cpu(), label)
            for part, label in zip(parts, labels, strict=True)
        ]


def in_order_of_runs(shares: Sequence[Sequence[Labelled]]) -> Labelled:
    """The shares of all processes as one set, in the order of a single process."""
    most = max(len(share) for share in shares)
    runs = list(chain.from_iterable([share[turn] for share in shares if turn < len(share)] for turn in range(most)))
    filled = [run for run in runs if len(run.labels)]
    if not filled:
        return Labelled(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    return Labelled(torch.cat([run.features for run in filled]), torch.cat([run.labels for run in filled]))


def feature_of(encoder: FrozenEncoder, kind: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``encode`` for ``LabelledCrops``: ``kind`` is class or mean."""

    def encode(pixels: Tensor) -> Tensor:
        features = encoder(pixels.to(device))
        chosen = features.class_token if kind == "class" else features.mean
        assert chosen is not None
        # A copy: a view would keep all tokens in memory.
        return chosen.clone()

    return encode
