"""What one worker does: reads its streams' blocks, gathers the samples of each step, decodes their pixels.

Workers undo Blosc and JPEG and draw masks; pixels leave them as uint8 and latents as the codec's integers, so that
little crosses to the device and normalisation and decoding happen there, in a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import DamageError, ImageError
from cae2pipe.images.views import decode_view
from cae2pipe.keyed import keyed_uniforms
from cae2pipe.loading.order import BlockRef, steps_per_epoch, stream_pieces, windows
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.store import Layout, StoreReader
from cae2pipe.targets.target_set import store_name


@dataclass(frozen=True)
class Plan:
    """Everything the content of batches depends on; the same in every process.

    ``units`` are the stores' manifest entries by name, ``blocks`` the blocks in sorted order.
    """

    root: Path
    units: dict[str, dict[str, Any]]
    blocks: list[BlockRef]
    layout: Layout
    size: int
    seed: int
    epochs: int
    batch: int
    streams: int
    window: int
    last_batch: str
    mask_strategy: str
    grid: int
    masked: int
    drop_columns: int
    norms: bool
    cache: BlockCache | None = None

    @property
    def samples(self) -> int:
        """Samples an epoch."""
        return sum(block.samples for block in self.blocks)

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return steps_per_epoch(self.samples, self.batch, self.last_batch)

    @property
    def per_stream(self) -> int:
        return self.batch // self.streams


@dataclass
class Batch:
    """A batch, or the part of it that some streams give. b samples, in the order of their streams.

    pixels (b, 3, S, S) uint8; arrays: the codec's arrays over b samples, uint16 as int16 bits, and ``norms`` (b, T) if
    asked; weights (b,) float32, 0 for padding; visible (b, V) and masked (b, M) int64 patch indices, sorted;
    drop (b, n) float32 uniforms for drop path; keys: b strings, empty for padding.
    """

    epoch: int
    step: int
    pixels: Tensor
    arrays: dict[str, Tensor]
    weights: Tensor
    visible: Tensor
    masked: Tensor
    drop: Tensor
    keys: list[str]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return {name: move(item) for name, item in value.items()} if isinstance(value, dict) else value

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Pool:
    """The samples of one window: keys, JPEGs, and the blocked arrays over all of them."""

    keys: list[str]
    jpegs: list[bytes]
    arrays: dict[str, np.ndarray]


class StreamSource:
    """Gives out one stream's samples, epoch by epoch."""

    def __init__(self, plan: Plan, stream: int):
        self.plan = plan
        self.stream = stream
        self._names = [*plan.layout.codec.arrays(), *(["norms"] if plan.norms else [])]
        # A reader keeps its store's index, keys and member offsets: about 0.2 MB.
        self._reader = functools.lru_cache(maxsize=64)(
            lambda name: StoreReader(plan.root, plan.units[name], plan.layout, plan.cache)
        )

    def samples(self, epoch: int, skip: int) -> Iterator[tuple[Pool, int]]:
        """The epoch's samples after the first ``skip``, as (pool, position in it). Skipped windows are not read."""
        plan = self.plan
        pieces = stream_pieces(plan.blocks, plan.seed, epoch, plan.streams, [self.stream])[self.stream]
        for window in windows(pieces, plan.window, plan.seed, epoch, self.stream):
            if skip >= len(window.order):
                skip -= len(window.order)
                continue
            pool = self._read(window.pieces)
            for position in window.order[skip:]:
                yield pool, int(position)
            skip = 0

    def _read(self, pieces: tuple) -> Pool:
        keys: list[str] = []
        jpegs: list[bytes] = []
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in self._names}
        specs = self.plan.layout.blocked()
        for piece in pieces:
            ref = self.plan.blocks[piece.index]
            block = self._reader(store_name(piece.view, ref.shard)).block(ref.block, self._names)
            keys += block.keys[piece.low : piece.high]
            jpegs += block.jpegs[piece.low : piece.high]
            for name in self._names:
                where = (slice(None),) * specs[name].sample_axis + (slice(piece.low, piece.high),)
                arrays[name].append(block.arrays[name][where])
        joined = {name: np.concatenate(parts, axis=specs[name].sample_axis) for name, parts in arrays.items()}
        return Pool(keys, jpegs, joined)


def batches(plan: Plan, streams: range, start: int) -> Iterator[Batch]:
    """The parts of all batches from global step ``start`` on that ``streams`` give, to the last epoch's end."""
    sources = [StreamSource(plan, stream) for stream in streams]
    for epoch in range(start // plan.steps, plan.epochs):
        first = start % plan.steps if epoch == start // plan.steps else 0
        iterators = [source.samples(epoch, first * plan.per_stream) for source in sources]
        for step in range(first, plan.steps):
            picked = [_take(iterator, plan.per_stream) for iterator in iterators]
            yield assemble(plan, epoch, epoch * plan.steps + step, streams, picked)


def assemble(plan: Plan, epoch: int, step: int, streams: range, picked: list[list[tuple[Pool, int] | None]]) -> Batch:
    """The batch part made of the samples picked from each stream; None stands for padding."""
    flat = [item for items in picked for item in items]
    count = len(flat)
    patches = plan.grid**2
    pixels = np.zeros((count, plan.size, plan.size, 3), dtype=np.uint8)
    visible = np.empty((count, patches - plan.masked), dtype=np.int64)
    masked = np.empty((count, plan.masked), dtype=np.int64)
    weights = np.zeros(count, dtype=np.float32)
    keys = []
    for row, item in enumerate(flat):
        key = item[0].keys[item[1]] if item else ""
        keys.append(key)
        mask = draw_mask(plan.mask_strategy, plan.grid, plan.grid, plan.masked, "mask", plan.seed, epoch, key)
        visible[row], masked[row] = split_indices(mask)
        if item:
            weights[row] = 1
            try:
                pixels[row] = decode_view(item[0].jpegs[item[1]])
            except (ImageError, ValueError) as error:
                raise DamageError(f"a stored view cannot be decoded: {error}", where=f"key {key}") from None
    drop = np.concatenate(
        [
            keyed_uniforms(len(items) * plan.drop_columns, "drop", plan.seed, step, stream).reshape(len(items), -1)
            for stream, items in zip(streams, picked, strict=True)
        ]
    ).astype(np.float32)
    return Batch(
        epoch=epoch,
        step=step,
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        arrays=as_tensors(gather(plan.layout, flat)),
        weights=torch.from_numpy(weights),
        visible=torch.from_numpy(visible),
        masked=torch.from_numpy(masked),
        drop=torch.from_numpy(drop),
        keys=keys,
    )


def gather(layout: Layout, items: list[tuple[Pool, int] | None]) -> dict[str, np.ndarray]:
    """The blocked arrays over the given samples; zeros for padding.

    Neighbours mostly come from one pool, whose rows are taken in one go.
    """
    runs: list[tuple[Pool, list[int], list[int]]] = []
    for row, item in enumerate(items):
        if item is None:
            continue
        if not runs or runs[-1][0] is not item[0]:
            runs.append((item[0], [], []))
        runs[-1][1].append(item[1])
        runs[-1][2].append(row)
    result = {}
    specs = layout.blocked()
    names = runs[0][0].arrays if runs else layout.codec.arrays()
    for name in names:
        axis = specs[name].sample_axis
        out = np.zeros(layout.shape(name, len(items)), dtype=specs[name].dtype)
        for pool, positions, rows in runs:
            out[(slice(None),) * axis + (rows,)] = np.take(pool.arrays[name], positions, axis=axis)
        result[name] = out
    return result


def join(parts: list[Batch], layout: Layout) -> Batch:
    """The whole batch from the parts of all workers, in order."""
    if len(parts) == 1:
        return parts[0]
    specs = layout.blocked()

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    arrays = {
        name: torch.cat([part.arrays[name] for part in parts], dim=specs[name].sample_axis) for name in parts[0].arrays
    }
    return Batch(
        epoch=parts[0].epoch,
        step=parts[0].step,
        pixels=cat("pixels"),
        arrays=arrays,
        weights=cat("weights"),
        visible=cat("visible"),
        masked=cat("masked"),
        drop=cat("drop"),
        keys=[key for part in parts for key in part.keys],
    )


def _take(iterator: Iterator[tuple[Pool, int]], count: int) -> list[tuple[Pool, int] | None]:
    return [next(iterator, None) for _ in range(count)]
