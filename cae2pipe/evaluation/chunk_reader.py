"""Chunks of random crops for training on classification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cae2pipe.errors import ImageError, SourceError
from cae2pipe.evaluation.crops import DrawnCrop
from cae2pipe.evaluation.datasets import Split
from cae2pipe.images.decode import decode_rgb
from cae2pipe.supervised.schedule import Chunk, Reader, TrainSchedule


class ChunkReader(Reader):
    """Chunks of random crops for classification.

    An image that cannot be decoded is replaced by the next decodable one of its chunk.

    Raises SourceError or DamageError if files cannot be read, SourceError if no image of a chunk can be decoded.
    """

    def __init__(self, split: Split, schedule: TrainSchedule, own: Sequence[int], *, start: int, crop: DrawnCrop):
        super().__init__(schedule, own, start)
        # Workers do not need the runs, which are another, equally large, list of the same images.
        self.root, self.samples, self.crop = split.root, split.samples, crop

    def __getitem__(self, index: int) -> Chunk:
        step, number = self.place(index)
        chosen = self.schedule.chunk(step, number)
        epoch = self.schedule.epoch(step)
        crop = DrawnCrop(self.crop.size, self.crop.settings, self.crop.mean, self.crop.seed, epoch)
        pixels: dict[int, np.ndarray] = {}
        rejected = []
        for position, image in enumerate(chosen.tolist()):
            sample = self.samples.read(image)
            try:
                decoded = decode_rgb(sample.data, where=f"{self.root}, {sample.key}")
            except ImageError as error:
                rejected.append({"path": sample.key, "reason": error.what})
                continue
            pixels[position] = crop(decoded, image).transpose(2, 0, 1)
        if not pixels:
            raise SourceError(
                f"none of the {len(chosen)} images of a chunk can be decoded: {rejected[0]['reason']}",
                where=f"{self.root}, {rejected[0]['path']}",
                fix="use `cae2pipe shard` to make a shard set of the images that can be decoded",
            )
        good = sorted(pixels)
        positions = [good[np.searchsorted(good, position) % len(good)] for position in range(len(chosen))]
        stacked = np.stack([pixels[position] for position in positions])
        labels = self.samples.labels[chosen[positions]]
        return Chunk(step, number, torch.from_numpy(stacked), torch.from_numpy(labels), tuple(rejected))
