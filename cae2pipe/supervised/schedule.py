"""The order of supervised training: pure functions of the number of images, the batch, the seed and the epoch.

An epoch is a permutation of all images, divided into steps, and each step into chunks. A chunk passes the model in one
forward pass, and all random draws for it depend on (seed, step, chunk) only. So it does not matter which process takes
it, or where an earlier run was killed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.runtime.keyed import keyed_permutation


@dataclass(frozen=True)
class TrainSchedule:
    """``epochs`` of ``steps`` with ``chunks`` each, using ``used`` of ``images`` images per epoch. ``limit`` may end it
    within an epoch."""

    images: int
    used: int
    steps: int
    chunks: int
    epochs: int
    seed: int
    limit: int | None = None

    @property
    def total(self) -> int:
        """Steps in total."""
        return min(self.steps * self.epochs, self.limit or self.steps * self.epochs)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the whole training, ends with a step."""
        return (step + 1) % self.steps == 0 or step + 1 == self.total

    def own(self, rank: int, ranks: int) -> range:
        """The chunks of every step that belong to one of several processes."""
        return range(self.chunks * rank // ranks, self.chunks * (rank + 1) // ranks)

    def epoch(self, step: int) -> int:
        """The epoch of a global step."""
        return step // self.steps

    def chunk(self, step: int, chunk: int) -> np.ndarray:
        """The images of one chunk of a global step, int64 (c,)."""
        epoch, number = divmod(step, self.steps)
        order = _order(self.images, self.seed, epoch)[: self.used]
        order = order[_share(len(order), self.steps, number)]
        return order[_share(len(order), self.chunks, chunk)]

    def size(self, step: int) -> int:
        """Images of a global step."""
        return len(range(self.used)[_share(self.used, self.steps, step % self.steps)])


@lru_cache(maxsize=2)
def _order(images: int, seed: int, epoch: int) -> np.ndarray:
    return keyed_permutation(images, "course", seed, epoch)


def _share(items: int, parts: int, number: int) -> slice:
    return slice(items * number // parts, items * (number + 1) // parts)


def full_batches(
    images: int, batch: int, chunk: int, *, epochs: int, seed: int, length: int | None = None
) -> TrainSchedule:
    """Batches of equal size in chunks of equal size; an epoch drops the rest, which differs from epoch to epoch. With
    ``length``, as many epochs as that many steps need.

    Raises:
        SourceError: there are fewer images than one batch needs.
    """
    if images < batch:
        raise SourceError(
            f"{images} training images are fewer than one batch of {batch}",
            fix=f"--set batch={max(2, images // 2 * 2)} with a chunk that divides it; lr scales with it",
        )
    steps = images // batch
    epochs = -(-length // steps) if length else epochs
    return TrainSchedule(
        images,
        used=steps * batch,
        steps=steps,
        chunks=batch // chunk,
        epochs=epochs,
        seed=seed,
        limit=length,
    )


def all_images(images: int, batch: int, steps: int, *, chunk: int, epochs: int, seed: int) -> TrainSchedule:
    """Every image in every epoch, in steps and chunks of nearly equal size."""
    chunks = max(1, math.ceil(min(batch, images) / chunk))
    return TrainSchedule(images, used=images, steps=steps, chunks=chunks, epochs=epochs, seed=seed)


def check_share(chunks: int, ranks: int) -> None:
    """Raise SettingsError if the chunks of a step cannot be divided evenly among processes."""
    if chunks % ranks:
        raise SettingsError(
            f"the number of chunks per step ({chunks}) is not divisible by the number of processes ({ranks})",
            where="chunk",
            fix=f"set chunk so that batch / chunk is a multiple of {ranks}",
        )


@dataclass(frozen=True)
class Chunk:
    """Crops of one chunk: pixels uint8 (c, 3, S, S) and labels int64 (c,), on the CPU or a device; ``rejected`` lists
    images that could not be decoded."""

    step: int
    number: int
    pixels: Tensor
    labels: Tensor
    rejected: tuple[dict[str, Any], ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The chunk with ``change`` applied to every tensor; subclasses with more tensors override this."""
        return replace(self, pixels=change(self.pixels), labels=change(self.labels))

    def to(self, device: torch.device) -> Self:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Reader(ABC):
    """Yields the chunks ``own`` of every step from ``start`` on, in order; picklable. ``root``: folder of images."""

    root: Path

    def __init__(self, schedule: TrainSchedule, own: Sequence[int], start: int):
        self.schedule, self.own, self.start = schedule, own, start

    def __len__(self) -> int:
        return (self.schedule.total - self.start) * len(self.own)

    @abstractmethod
    def __getitem__(self, index: int) -> Chunk: ...

    def place(self, index: int) -> tuple[int, int]:
        """The global step and the chunk number of an item."""
        step, position = divmod(index, len(self.own))
        return step + self.start, self.own[position]
