"""The worker's half of extraction: the originals of one block in, its views out, with the JPEGs that the set keeps.

An image is decoded once for several of its views. A worker returns the JPEG of each stored view, or of the reduced
image that replayed views are cut from, and the pixels that loaders of the set will make of it. The teacher sees those
pixels, so the student trains on exactly what the teacher saw.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cae2pipe.config.extract import ViewSettings
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.jpeg import decode_into, open_jpeg
from cae2pipe.images.kept import keep_image
from cae2pipe.images.views import draw_view, encode_jpeg, render_view
from cae2pipe.runtime.workers import in_order
from cae2pipe.shards.shard_set import ImageSample, Shard, ShardSet
from cae2pipe.targets.chunks import BLOCK


@dataclass(frozen=True)
class Task:
    """Render ``views`` of the samples [block * 64, ...) of a shard."""

    shard: Shard
    block: int
    views: tuple[int, ...]


VIEWS_AT_ONCE = 8
"""Maximum number of views of a block per item: 77 MB at 224 pixels, of which each worker has up to three in shared
memory. An image is decoded once for this many views."""


def block_tasks(shard: Shard, views: Sequence[int]) -> list[Task]:
    """The tasks of a shard: block by block, and within a block its views in groups."""
    return [
        Task(shard, block, tuple(views[first : first + VIEWS_AT_ONCE]))
        for block in range(-(-shard.samples // BLOCK))
        for first in range(0, len(views), VIEWS_AT_ONCE)
    ]


@dataclass(frozen=True)
class RenderedBlock:
    """A block's views, and the JPEGs that are kept of them.

    For each of ``task.views``: b JPEGs (none if views are replayed), the pixels that the teacher will see, uint8 (b, 3,
    H, W), and the draws, float64 (b, 11). ``kept``: the images that replayed views are cut from.
    """

    task: Task
    keys: list[str]
    labels: np.ndarray
    jpegs: list[list[bytes]]
    pixels: list[Tensor]
    draws: list[np.ndarray]
    kept: list[bytes] = field(default_factory=list)


class BlockRenderer(Sized, Protocol):
    """Gives the blocks of tasks by number; picklable for worker processes."""

    tasks: Sequence[Task]

    def __getitem__(self, index: int) -> RenderedBlock: ...


class Renderer:
    """Renders task by task; picklable for worker processes.

    ``kept``: the shards hold the images that replayed views are cut from; otherwise they hold originals, which are
    reduced first.
    """

    def __init__(
        self, shards: ShardSet, tasks: Sequence[Task], settings: ViewSettings, *, seed: int, kept: bool = False
    ):
        self.shards = shards
        self.tasks = tasks
        self.settings = settings
        self.seed = seed
        self.kept = kept

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> RenderedBlock:
        task, settings = self.tasks[index], self.settings
        samples = read_block(self.shards, task.shard, task.block)
        replayed = settings.pixels == "replayed"
        kept: list[bytes] = []
        jpegs: list[list[bytes]] = [[] for _ in task.views]
        shape = (len(samples), settings.size, settings.size, 3)
        pixels = [np.empty(shape, dtype=np.uint8) for _ in task.views]
        draws: list[list[np.ndarray]] = [[] for _ in task.views]
        for row, sample in enumerate(samples):
            if replayed:
                jpeg = sample.data if self.kept else keep_original(sample, task.shard, settings)
                image = open_jpeg(jpeg)
                kept.append(jpeg)
            else:
                image = decode_rgb(sample.data, where=f"{task.shard.path}, key {sample.key}")
            grey = image.convert("L") if len(task.views) > 1 else None
            for index, view in enumerate(task.views):
                draw = draw_view(settings, self.seed, sample.key, view=view, height=image.height, width=image.width)
                rendered = render_view(image, draw, settings, grey)
                if replayed:
                    pixels[index][row] = np.asarray(rendered)
                else:
                    jpegs[index].append(encode_jpeg(rendered, settings))
                    decode_into(jpegs[index][-1], pixels[index][row])
                draws[index].append(draw.to_row())
        labels = np.array([sample.label for sample in samples], dtype=np.int32)
        planes = [torch.from_numpy(view).permute(0, 3, 1, 2) for view in pixels]
        keys = [sample.key for sample in samples]
        return RenderedBlock(task, keys, labels, jpegs, planes, [np.stack(rows) for rows in draws], kept)


class Reducer:
    """Blocks of the images that replayed views are cut from, made from the originals; picklable like ``Renderer``."""

    def __init__(self, shards: ShardSet, blocks: Sequence[tuple[Shard, int]], settings: ViewSettings):
        self.shards = shards
        self.blocks = blocks
        self.settings = settings

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[Shard, list[ImageSample]]:
        shard, block = self.blocks[index]
        samples = read_block(self.shards, shard, block)
        return shard, [replace(sample, data=keep_original(sample, shard, self.settings)) for sample in samples]


def read_block(shards: ShardSet, shard: Shard, block: int) -> list[ImageSample]:
    low = block * BLOCK
    return shards.read(shard, low, min(low + BLOCK, shard.samples))


def keep_original(sample: ImageSample, shard: Shard, settings: ViewSettings) -> bytes:
    """The reduced JPEG of an original, which the set keeps."""
    return keep_image(decode_rgb(sample.data, where=f"{shard.path}, key {sample.key}"), settings)


def render_blocks(renderer: BlockRenderer, workers: int) -> Generator[RenderedBlock, None, None]:
    """All tasks' blocks, in order."""
    # Rendering one block is faster than starting a process.
    return in_order(renderer, min(workers, len(renderer)) if len(renderer) > 1 else 0, preload=[__name__])
