"""The worker's half of extraction: originals of one block in, stored views of it out.

An image is decoded once for all its views. What leaves a worker is the JPEG bytes as they will be stored and what they
decode to: the teacher sees that, so that the student trains on exactly what the teacher saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cae2pipe.config.extract import ViewSettings
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.jpeg import decode_view
from cae2pipe.images.views import draw_view, encode_view, render_view
from cae2pipe.loading.workers import in_order
from cae2pipe.shards.shard_set import Shard, ShardSet
from cae2pipe.targets.chunks import BLOCK


@dataclass(frozen=True)
class Task:
    """Render ``views`` of the samples [block * 64, ...) of a shard."""

    shard: Shard
    block: int
    views: tuple[int, ...]


@dataclass(frozen=True)
class RenderedBlock:
    """A block's views: for each of ``task.views`` the JPEGs (b of them), their pixels as the teacher will see them,
    uint8 (b, 3, H, W), and the draws, float64 (b, 11)."""

    task: Task
    keys: list[str]
    labels: np.ndarray
    jpegs: list[list[bytes]]
    pixels: list[Tensor]
    draws: list[np.ndarray]


class Renderer(Dataset):
    """Renders task by task; picklable, so that workers of a DataLoader can hold it."""

    def __init__(self, shards: ShardSet, tasks: Sequence[Task], settings: ViewSettings, seed: int):
        self.shards = shards
        self.tasks = tasks
        self.settings = settings
        self.seed = seed

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> RenderedBlock:
        task = self.tasks[index]
        low = task.block * BLOCK
        samples = self.shards.read(task.shard, low, min(low + BLOCK, task.shard.samples))
        jpegs: list[list[bytes]] = [[] for _ in task.views]
        draws: list[list[np.ndarray]] = [[] for _ in task.views]
        for sample in samples:
            image = decode_rgb(sample.data, where=f"{task.shard.path}, key {sample.key}")
            for place, view in enumerate(task.views):
                draw = draw_view(self.settings, self.seed, sample.key, view, image.height, image.width)
                jpegs[place].append(encode_view(render_view(image, draw, self.settings), self.settings))
                draws[place].append(draw.to_row())
        labels = np.array([sample.label for sample in samples], dtype=np.int32)
        pixels = [
            torch.from_numpy(np.stack([decode_view(jpeg) for jpeg in view])).permute(0, 3, 1, 2) for view in jpegs
        ]
        stacked = [np.stack(rows) for rows in draws]
        return RenderedBlock(task, [s.key for s in samples], labels, jpegs, pixels, stacked)


def render(renderer: Renderer, workers: int) -> Iterator[RenderedBlock]:
    """All tasks' blocks, in order."""
    # One block is rendered sooner than a process is started.
    return in_order(renderer, min(workers, len(renderer)) if len(renderer) > 1 else 0)
