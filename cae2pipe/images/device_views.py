"""Rendering views in batches on any device, bit for bit like ``render_view`` with Pillow.

Pillow resamples 8-bit images with integers, blends them in single precision and takes means of integers, so that the
same operations in the same order give equal pixels. This module follows its Resample.c, Blend.c, Convert.c and
ImageStat.py. If a compiler fuses Blend.c's multiplication and addition into one rounding, as it may on processors with
such an instruction in their base set, a few of Pillow's pixels differ. Pillow's wheels for x86-64 round twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import ImageError
from cae2pipe.images.views import DRAW_COLUMNS, ORDERS

COLUMN = {name: index for index, name in enumerate(DRAW_COLUMNS)}
SLOTS = np.array([[COLUMN[name] for name in order] for order in ORDERS])
"""(6, 3): which columns of a draw hold the factors of its first, second and third operation."""

LANES = 1024
"""Pixels in a block. An image is a whole number of blocks, the last one padded with black, so that values per image can
be broadcast and summed by blocks, whatever the sizes."""

PRECISION_BITS = 32 - 8 - 2
"""Fractional bits of a tap's weight, as in Resample.c."""

GROUP_BYTES = 2**28
"""Largest size of the temporary tensors of a group of views, in bytes; a view that needs more forms its own group.
Fused by a compiler they take far less."""
JITTER_BYTES, RESAMPLE_BYTES = 64, 64
"""Largest size of temporaries without a compiler: per pixel of the images, and per output pixel of a resampling
pass."""

TAPS_STEP = 8
"""Compiled code is specialised to a number of taps: they are rounded up to multiples of this. Boxes of up to twice the
size of a view have at most 8."""


def render_views(
    images: Sequence[Tensor],
    draws: np.ndarray | Tensor,
    size: int,
    *,
    backend: str | Callable[..., Any] | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """The views of RGB images, uint8 (n, 3, size, size), on the images' device. The host never waits for the device.

    Args:
        images: n > 0 images, uint8 (3, h, w), of any sizes, all on one device.
        draws: float64 (n, 11) on the host, columns as in ``DRAW_COLUMNS``; one row per image.
        backend: of ``torch.compile``, for the inner functions; None runs them as they are.
        names: the images' names for errors.

    Raises:
        ImageError: a draw was made for an image of another size, or its box is not inside the image.
    """
    rows = np.asarray(draws, dtype=np.float64)
    if rows.shape != (len(images), len(DRAW_COLUMNS)) or not images:
        raise ValueError(f"{len(images)} images and draws of shape {rows.shape}: give one row per image")
    _check(images, rows, names or [f"image {row} of the batch" for row in range(len(images))])
    plan = RenderPlan.of(rows, size, compiled=backend is not None)
    device = images[0].device
    numbers, view_of_block = _upload(plan.numbers, device), _upload(plan.view_of_block, device)
    factors, first, weights = (_upload(array, device) for array in (plan.factors, plan.first, plan.weights))
    views = images[0].new_empty(len(images), 3, size, size)
    for group in plan.groups:
        own = numbers[:, group.views]
        planes = _planes([images[index] for index in plan.order[group.views].tolist()])
        jitter, resample = (_inner(function, backend) for function in (jittered, resampled))
        # Copies, since a compiler would specialise on their offset in the batch's tensors.
        planes = jitter(
            planes,
            view_of_block[group.blocks].clone(),
            own[RenderPlan.PIXELS].clone(),
            own[RenderPlan.GREY :].to(torch.int16),
            factors[:, group.views].clone(),
            group.before,
        )
        corner, stride, step = (
            own[row][:, None, None].clone() for row in (RenderPlan.CORNER, RenderPlan.STRIDE, RenderPlan.STEP)
        )
        # Across: every row of the boxes, from left to right of the view, which is right to left if it is flipped.
        lines = torch.arange(group.height, device=device)[:, None]
        start = corner + lines * stride + step * first[own[RenderPlan.ACROSS]][:, None, :]
        across = weights[: group.taps_across, own[RenderPlan.ACROSS]][:, :, None, :]
        planes = resample(planes.view(3, -1), start, step, across)
        # Down: (n, height, size) are contiguous, with a stride of ``size`` between rows.
        lines = torch.arange(len(corner), device=device)[:, None] * group.height + first[own[RenderPlan.DOWN]]
        start = lines[:, :, None] * size + torch.arange(size, device=device)
        down = weights[: group.taps_down, own[RenderPlan.DOWN]][:, :, :, None]
        planes = resample(planes.view(3, -1), start, torch.full_like(step, size), down)
        views.index_copy_(0, own[RenderPlan.POSITION], planes.transpose(0, 1))
    return views


def jittered(planes: Tensor, view: Tensor, pixels: Tensor, grey: Tensor, factors: Tensor, before: int) -> Tensor:
    """Images with brightness, contrast and saturation adjusted, each in its own order.

    Args:
        planes: uint8 (3, blocks, LANES), black where images end. view: int64 (blocks,), the view of each block.
        pixels: int64 (n,), of each image. grey: int16 (3, n), 1 where an operation is saturation, else 0.
        factors: (3, n), of each operation, in float32's precision. before: number of operations before contrast.
    """
    grey, factors = grey[:, view, None], factors[:, view, None]
    for slot in range(before):
        planes = blended(luminance(planes) * grey[slot], planes, factors[slot])
    # Black has stayed black so far, and adds nothing to the sum.
    sums = torch.zeros_like(pixels).index_add_(0, view, luminance(planes).sum(1))
    mean = (2 * sums + pixels) // (2 * pixels)
    planes = blended(mean.to(torch.int16)[view, None], planes, factors[before])
    for slot in range(before + 1, 3):
        planes = blended(luminance(planes) * grey[slot], planes, factors[slot])
    return planes


def luminance(planes: Tensor) -> Tensor:
    """Pillow's mode L of uint8 (3, ...): int16 (...)."""
    red, green, blue = planes.to(torch.int32).unbind()
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.int16)


def blended(base: Tensor, planes: Tensor, factor: Tensor) -> Tensor:
    """Pillow's ``Image.blend`` of int16 ``base`` and uint8 ``planes``, in single precision.

    The product is rounded before it is added. A compiler may fuse both into one operation, which rounds once,
    unless ``factor`` is float64: then the product is exact, and the conversion rounds it.
    """
    product = (factor * (planes.to(torch.int16) - base)).to(torch.float32)
    return (product + base).clamp(0, 255).to(torch.uint8)


def resampled(flat: Tensor, start: Tensor, step: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of pixels ``step`` apart.

    Args:
        flat: uint8 (3, m). start: int64 (n, rows, columns), the index of the first tap of each output pixel.
        step: int64 (n, 1, 1). weights: int32 (taps, n, rows or 1, columns or 1); 0 beyond the image.

    Returns:
        uint8 (3, n, rows, columns).
    """
    total = torch.full_like(start, 1 << (PRECISION_BITS - 1), dtype=torch.int32)
    for tap, weight in enumerate(weights):
        total = total + flat[:, (start + tap * step).clamp(0, flat.shape[1] - 1)] * weight
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


@cache
def _inner(function: Callable[..., Any], backend: str | Callable[..., Any] | None) -> Callable[..., Any]:
    return function if backend is None else torch.compile(function, backend=backend, dynamic=True)


@dataclass(frozen=True)
class Group:
    """Consecutive views in a plan's order, rendered together: their views and blocks, the number of operations before
    contrast, the rows of the tallest box, and the largest number of taps."""

    views: slice
    blocks: slice
    before: int
    height: int
    taps_across: int
    taps_down: int


@dataclass(frozen=True)
class RenderPlan:
    """How to render n views, as computed on the host.

    order: (n,), images sorted into groups. numbers: int64 (11, n) in this order, rows as named below.
    factors: (3, n). view_of_block: int64 (blocks,), relative to its group. first: int64 (lengths, size) and weights:
    int32 (taps, lengths, size), for all side lengths of the boxes.
    """

    CORNER, STRIDE, STEP, PIXELS, ACROSS, DOWN, POSITION, GREY = range(8)
    """Rows of ``numbers``: index of the view's upper left pixel, from the group's first block; pixels to the next row;
    +1, or -1 if it is flipped; pixels of the image; the lengths of the box's sides, as indices into ``first``; the
    view's position in the batch; from GREY on, three rows that mark the saturation operations."""

    order: np.ndarray
    groups: list[Group]
    numbers: np.ndarray
    factors: np.ndarray
    view_of_block: np.ndarray
    first: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, draws: np.ndarray, size: int, compiled: bool) -> RenderPlan:
        slots = SLOTS[draws[:, COLUMN["order"]].astype(int)]
        before = (slots == COLUMN["contrast"]).argmax(1)
        # The tallest box of a group determines how many rows are resampled for all.
        order = np.lexsort((-draws[:, COLUMN["height"]], before))
        draws, slots, before = draws[order], slots[order], before[order]
        top, left, height, width, flip, *_, tall, wide = draws.T.astype(np.int64)
        blocks = -(-tall * wide // LANES)
        ends = np.concatenate(([0], blocks.cumsum()))
        lengths, sides = np.unique(np.stack((width, height)), return_inverse=True)
        across, down = sides.reshape(2, -1)
        first, weights, taps = _tables(lengths, size, TAPS_STEP if compiled else 1)
        groups = [
            Group(
                views=slice(low, high),
                blocks=slice(int(ends[low]), int(ends[high])),
                before=int(before[low]),
                height=int(height[low]),
                taps_across=int(taps[across[low:high]].max()),
                taps_down=int(taps[down[low:high]].max()),
            )
            for low, high in _cut(before, blocks, height, size=size)
        ]
        members = [group.views.stop - group.views.start for group in groups]
        offset = ends[:-1] - np.repeat([group.blocks.start for group in groups], members)
        # A box is drawn on the flipped image.
        side = np.where(flip == 1, wide - 1 - left, left)
        corner = offset * LANES + top * wide + side
        grey = (slots == COLUMN["saturation"]).T
        # Blend.c uses single precision.
        factors = np.take_along_axis(draws, slots, 1).T.astype(np.float32)
        return cls(
            order=order,
            groups=groups,
            numbers=np.stack((corner, wide, 1 - 2 * flip, tall * wide, across, down, order, *grey)),
            factors=np.ascontiguousarray(factors, dtype=np.float64 if compiled else np.float32),
            view_of_block=np.repeat(np.concatenate([np.arange(count) for count in members]), blocks),
            first=first,
            weights=weights,
        )


def _cut(before: np.ndarray, blocks: np.ndarray, height: np.ndarray, *, size: int) -> list[tuple[int, int]]:
    """Where groups begin and end; heights decrease within equal ``before``."""
    groups: list[tuple[int, int]] = []
    begin = taken = 0
    for view, (own, count) in enumerate(zip(before.tolist(), blocks.tolist(), strict=True)):
        taken += count
        rows = max(int(height[begin]), size)
        resampling = RESAMPLE_BYTES * (view - begin + 1) * rows * size
        full = max(JITTER_BYTES * taken * LANES, resampling) > GROUP_BYTES
        if view > begin and (full or own != before[begin]):
            groups.append((begin, view))
            begin, taken = view, count
    return [*groups, (begin, len(before))]


def _tables(lengths: np.ndarray, size: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``first`` and ``weights`` of a plan, and the taps of each (lengths,), rounded up to a multiple of step."""
    each = [bicubic_taps(length, size) for length in lengths.tolist()]
    taps = np.array([-(-len(own) // step) * step for _, own in each])
    weights = np.zeros((taps.max(), len(lengths), size), dtype=np.int32)
    for index, (_, own) in enumerate(each):
        weights[: len(own), index] = own
    return np.stack([first for first, _ in each]), weights, taps


@lru_cache(maxsize=2048)
def bicubic_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's antialiased bicubic resampling of ``length`` to ``size`` pixels: int64 (size,), the first source pixel,
    and int32 (taps, size), the weights of it and those after it in units of 2^-22.

    Each operation in double precision and in the order of Resample.c: the last bit affects how a weight is rounded.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum(np.trunc(center - support + 0.5), 0)
    count = np.minimum(np.trunc(center + support + 0.5), length) - first
    tap = np.arange(count.max())[:, None]
    weights = _bicubic(np.abs((tap + first - center + 0.5) * (1.0 / stretch)))
    weights[tap >= count] = 0
    total = np.zeros(size)
    for row in weights:  # numpy's sum would add in another order
        total += row
    weights = weights / total * (1 << PRECISION_BITS)
    return first.astype(np.int64), np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """The cubic kernel with a = -0.5, of x >= 0."""
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _planes(images: list[Tensor]) -> Tensor:
    """Images one after another, uint8 (3, blocks, LANES)."""
    black = images[0].new_zeros(3 * LANES)
    parts: list[Tensor] = []
    for image in images:
        pixels = image.reshape(3, -1)
        missing = -pixels.shape[1] % LANES
        parts += (pixels, black[: 3 * missing].view(3, missing))
    return torch.cat(parts, dim=1).view(3, -1, LANES)


def _check(images: Sequence[Tensor], draws: np.ndarray, names: Sequence[str]) -> None:
    top, left, height, width, *_, tall, wide = draws.T
    sizes = np.array([tuple(image.shape[1:]) for image in images])
    for row in np.flatnonzero((sizes != np.stack((tall, wide), 1)).any(1))[:1]:
        raise ImageError(
            f"the view was drawn for an image of {int(wide[row])} x {int(tall[row])} pixels, "
            f"but this one has {sizes[row, 1]} x {sizes[row, 0]}",
            where=names[row],
            fix="give the image that the view was drawn from",
        )
    inside = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1) & (top + height <= tall) & (left + width <= wide)
    for row in np.flatnonzero(~inside)[:1]:
        raise ImageError(
            f"the view's box is not inside its image of {int(wide[row])} x {int(tall[row])} pixels",
            where=names[row],
            fix="give the original draw",
        )


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    # From pageable memory the copy would wait for the device's queued work.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
