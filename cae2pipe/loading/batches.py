"""The work of one loader process: reads blocks of its streams, gathers the samples of each step, decodes their pixels.

Workers decompress Blosc chunks, decode JPEGs and draw masks. They return pixels as uint8 and latents as the codec's
integers, so little data is copied to the device; normalisation and decoding of latents happen there, in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import DamageError, ImageError
from cae2pipe.images.kept import view_into
from cae2pipe.images.views import DRAW_COLUMNS
from cae2pipe.loading.order import real_samples
from cae2pipe.loading.plan import Plan
from cae2pipe.loading.stream import Item, Piece, StreamSource, readers
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.runtime.keyed import keyed_uniforms
from cae2pipe.runtime.shared_memory import RoundArray, round_parts
from cae2pipe.targets.planes import is_spare, same_width


@dataclass
class Batch:
    """A batch, or the part of it from some streams: b views in the order of their streams, with r masks each.

    pixels (b, 3, S, S) uint8; arrays: the requested arrays of the store over b views, by ``array_name``; weights
    (b,) float32, 0 for padding; visible (b r, V) and masked (b r, M) int64 patch indices, sorted, the masks of a view
    in consecutive rows; drop (b r, n) float32 uniforms for drop path; keys: b strings, empty for padding; views: the
    number of each stored view; labels: their classes, -1: none; real: views of the whole global batch that are not
    padding. If the device decodes, ``jpegs`` holds all JPEGs concatenated, uint8, ``sizes`` (b,) their lengths, and
    ``pixels`` has no samples; ``draws``, float64 (b, 11), says how replayed views are cut from them.
    """

    epoch: int
    step: int
    real: int
    pixels: Tensor
    jpegs: Tensor
    sizes: Tensor
    arrays: dict[str, Tensor]
    weights: Tensor
    visible: Tensor
    masked: Tensor
    drop: Tensor
    keys: list[str]
    views: list[int]
    labels: list[int] = field(default_factory=list)
    draws: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``function`` applied to its tensors. JPEGs stay on the host, from where they are decoded."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return {name: move(item) for name, item in value.items()} if isinstance(value, dict) else value

        stays = ("jpegs", "sizes", "draws")
        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self) if f.name not in stays})

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def batches(plan: Plan, streams: range, start: int, served: range | None = None) -> Iterator[Batch]:
    """The parts from ``streams`` of all batches, from global step ``start`` to the end of the last epoch.

    Args:
        served: the streams of all workers together, if there are others.
    """
    first = start // plan.steps
    skip = start % plan.steps * plan.per_stream
    reader = readers(plan)
    sources = [StreamSource(plan, stream, reader, epoch=first, skip=skip) for stream in streams]
    for epoch in range(first, plan.epochs):
        for step in range(start % plan.steps if epoch == first else 0, plan.steps):
            picked = [source.take(epoch, plan.per_stream) for source in sources]
            yield assemble(
                plan, epoch, epoch * plan.steps + step, streams=streams, served=served or streams, picked=picked
            )
        for source in sources:
            source.end(epoch)


def shared_arrays(plan: Plan, views: int) -> dict[str, RoundArray]:
    """The arrays of ``views`` views that workers fill together."""
    arrays = {
        "weights": RoundArray((views,), "<f4"),
        "visible": RoundArray((views, plan.repeat, plan.grid**2 - plan.masked), "<i8"),
        "masked": RoundArray((views, plan.repeat, plan.masked), "<i8"),
        "drop": RoundArray((views, plan.repeat, plan.drop_columns), "<f4"),
    }
    if plan.decode:
        arrays["pixels"] = RoundArray((views, plan.size, plan.size, 3), "|u1")
    loaded = plan.loaded()
    for name in plan.arrays:
        if not is_spare(name):
            arrays[name] = RoundArray(loaded[name].shape(views), loaded[name].dtype, loaded[name].sample_axis)
    return arrays


def assemble(
    plan: Plan, epoch: int, step: int, *, streams: range, served: range, picked: list[list[Item | None]]
) -> Batch:
    """The part of a batch with the given samples of each stream; None stands for padding."""
    flat = [item for items in picked for item in items]
    first = (streams.start - served.start) * plan.per_stream
    arrays = shared_arrays(plan, len(served) * plan.per_stream)
    parts = round_parts(arrays, range(first, first + len(flat)))
    rows = {name: parts[name].flatten(0, 1) for name in ("visible", "masked", "drop")}
    visible, masked = rows["visible"].numpy(), rows["masked"].numpy()
    for row in range(len(visible)):
        item, turn = flat[row // plan.repeat], row % plan.repeat
        draw = ("mask", plan.seed, epoch, item[0].keys[item[1]] if item else "", *((turn,) if turn else ()))
        attention = item[0].arrays["attention"][item[1]] if item and plan.guides else None
        mask = draw_mask(plan.mask_strategy, plan.grid, plan.grid, plan.masked, *draw, attention=attention)
        visible[row], masked[row] = split_indices(mask)
    images = [item[0].images[item[1]] if item else b"" for item in flat]
    if plan.decode:
        pixels = parts["pixels"].numpy()
        for row, item in enumerate(flat):
            if item:
                _decode(plan, *item, epoch=epoch, out=pixels[row])
            else:
                pixels[row] = 0
    drop = [
        keyed_uniforms(len(items) * plan.repeat * plan.drop_columns, "drop", plan.seed, step, stream)
        for stream, items in zip(streams, picked, strict=True)
    ]
    rows["drop"].numpy().reshape(-1)[:] = np.concatenate(drop)
    parts["weights"].numpy()[:] = [item is not None for item in flat]
    packed = np.frombuffer(b"" if plan.decode else b"".join(images), dtype=np.uint8)
    return Batch(
        epoch=epoch,
        step=step,
        real=real_samples(plan.samples, plan.streams, plan.per_stream, step=step % plan.steps),
        pixels=parts["pixels"].permute(0, 3, 1, 2) if plan.decode else torch.empty(0, 3, plan.size, plan.size).byte(),
        jpegs=torch.from_numpy(packed.copy()),
        # In memory of their own, as the JPEGs: a batch keeps them on the host, and must not keep its round there.
        sizes=torch.tensor([] if plan.decode else [len(image) for image in images], dtype=torch.int64),
        draws=_draws(plan, flat),
        arrays=gather(plan, flat, parts),
        weights=parts["weights"],
        visible=rows["visible"],
        masked=rows["masked"],
        drop=rows["drop"],
        keys=[item[0].keys[item[1]] if item else "" for item in flat],
        views=[item[0].view if item else -1 for item in flat],
        labels=[item[0].labels[item[1]] if item else -1 for item in flat],
    )


def _decode(plan: Plan, piece: Piece, position: int, *, epoch: int, out: np.ndarray) -> None:
    """Write a sample's pixels into ``out``, uint8 (S, S, 3)."""
    image, key = piece.images[position], piece.keys[position]
    if plan.fresh:
        out[...] = plan.fresh.render(image, key, epoch)
        return
    try:
        view_into(image, piece.draws[position], plan.replayed, out, view_size=plan.view_size)
    except ImageError as error:
        raise DamageError(error.what, where=f"key {key}", fix=error.fix) from None


def _draws(plan: Plan, items: list[Item | None]) -> Tensor:
    """The draws by which the device cuts replayed views; zeros for padding."""
    if plan.decode or plan.replayed is None:
        return torch.zeros(len(items), 0, dtype=torch.float64)
    rows = [item[0].draws[item[1]] if item else np.zeros(len(DRAW_COLUMNS)) for item in items]
    return torch.from_numpy(np.stack(rows))


def gather(plan: Plan, items: list[Item | None], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plan's arrays over the given samples, in ``parts`` where they have a place; zeros for padding."""
    loaded = plan.loaded()
    runs = [
        (piece, [item[1] for _, item in run if item], run[0][0], run[-1][0] + 1)
        for piece, run in ((key[1], list(run)) for key, run in groupby(enumerate(items), key=_piece_of))
        if piece is not None
    ]
    result = {}
    for name in plan.arrays:
        axis = loaded[name].sample_axis
        if is_spare(name):
            width = max([loaded[name].rest[0], *(piece.arrays[name].shape[1] for piece, *_ in runs)])
            result[name] = torch.from_numpy(np.zeros((len(items), width), dtype=loaded[name].dtype))
        else:
            result[name] = parts[name]
        into = result[name].numpy()
        if None in items:
            into[...] = 0
        for piece, positions, first, last in runs:
            taken = np.take(piece.arrays[name], positions, axis=axis)
            rows = into[(slice(None),) * axis + (slice(first, last),)]
            (rows[:, : taken.shape[1]] if is_spare(name) else rows)[...] = taken
    return result


def _piece_of(numbered: tuple[int, Item | None]) -> tuple[int, Piece | None]:
    piece = numbered[1][0] if numbered[1] else None
    return id(piece), piece


def join(parts: list[Batch], axes: Mapping[str, int]) -> Batch:
    """The whole batch from its parts, in order. ``axes``: which axis of each array runs over samples.

    What workers have made in shared memory is adjacent there, and is not copied.
    """
    if len(parts) == 1:
        return parts[0]
    tensors = ("jpegs", "sizes", "draws", "weights", "visible", "masked", "drop")
    arrays = {}
    for name in parts[0].arrays:
        own = [part.arrays[name] for part in parts]
        arrays[name] = joined_tensors(same_width(own) if is_spare(name) else own, axes[name])
    joined: dict[str, Any] = {name: joined_tensors([getattr(part, name) for part in parts], 0) for name in tensors}
    # As they lie in memory, channels last.
    joined["pixels"] = joined_tensors([part.pixels.permute(0, 2, 3, 1) for part in parts], 0).permute(0, 3, 1, 2)
    return replace(
        parts[0],
        **joined,
        arrays=arrays,
        keys=[key for part in parts for key in part.keys],
        views=[view for part in parts for view in part.views],
        labels=[label for part in parts for label in part.labels],
    )


def joined_tensors(tensors: list[Tensor], axis: int) -> Tensor:
    """``torch.cat``, or a view of the whole if the tensors are adjacent in memory."""
    first = tensors[0]
    shape = list(first.shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    offset, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        there = (tensor.untyped_storage().data_ptr(), tensor.stride(), tensor.storage_offset())
        if there != (storage, first.stride(), offset):
            break
        offset += tensor.shape[axis] * first.stride(axis)
    else:
        return first.as_strided(shape, first.stride())
    if first.device.type != "cpu":
        return torch.cat(tensors, dim=axis)
    # numpy asks for large pages, which are ready sooner.
    whole = torch.from_numpy(np.empty(shape, dtype=first.new_empty(0).numpy().dtype))
    return torch.cat(tensors, dim=axis, out=whole)


def split(batch: Batch, axes: Mapping[str, int], count: int) -> list[Batch]:
    """A decoded batch in ``count`` equal parts; the masks of a view stay together. ``axes`` as in ``join``."""
    if count == 1:
        return [batch]
    size = len(batch.weights) // count
    repeat = len(batch.visible) // len(batch.weights)
    parts = []
    for low in range(0, len(batch.weights), size):
        own, rows = slice(low, low + size), slice(low * repeat, (low + size) * repeat)
        parts.append(
            replace(
                batch,
                pixels=batch.pixels[own],
                arrays={n: array.narrow(axes[n], low, size) for n, array in batch.arrays.items()},
                weights=batch.weights[own],
                visible=batch.visible[rows],
                masked=batch.masked[rows],
                drop=batch.drop[rows],
                keys=batch.keys[own],
                views=batch.views[own],
                labels=batch.labels[own],
            )
        )
    return parts


def without_padding(batch: Batch, axes: Mapping[str, int]) -> Batch:
    """The samples of a decoded batch under one mask each that are not padding. ``axes`` as in ``join``."""
    rows = [row for row, key in enumerate(batch.keys) if key]
    if len(rows) == len(batch.keys):
        return batch
    index = torch.tensor(rows, dtype=torch.int64, device=batch.weights.device)
    tensors = ("pixels", "weights", "visible", "masked", "drop")
    return replace(
        batch,
        **{name: getattr(batch, name).index_select(0, index) for name in tensors},
        arrays={name: array.index_select(axes[name], index) for name, array in batch.arrays.items()},
        keys=[batch.keys[row] for row in rows],
        views=[batch.views[row] for row in rows],
        labels=[batch.labels[row] for row in rows],
    )
