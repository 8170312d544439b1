"""Which patches are masked. numpy only: masks are drawn in the loader's workers."""

from __future__ import annotations

import functools
import math
import operator

import numpy as np

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.keyed import keyed_permutation, keyed_uniforms

SMALLEST_BLOCK = 16
"""Minimum patches of a block, while at least that many are still to be masked."""
SMALLEST_ASPECT = 0.3
"""The aspect ratio (height / width) of blocks is log-uniform between this and its inverse."""
TRIES = 32
"""Blocks tried from one batch of uniforms: six masks of seven need no second batch."""
LOTS = 20
"""Batches of uniforms after which single patches fill the rest: almost never reached at the paper's ratios."""


def draw_mask(
    strategy: str, rows: int, cols: int, count: int, *key: str | int, attention: np.ndarray | None = None
) -> np.ndarray:
    """A mask with exactly ``count`` patches masked, bool (rows, cols), determined by ``key`` and ``attention`` only.

    Args:
        strategy: ``block``, ``random`` or ``attention``.
        rows, cols: the grid of patches.
        count: masked patches, below rows x cols.
        key: what the draw depends on, such as ("mask", seed, epoch, sample key).
        attention: (rows x cols,), not negative, for strategy ``attention``. None: uniform.

    Raises:
        SettingsError: unknown strategy.
    """
    if strategy == "block":
        return block_mask(rows, cols, count, *key)
    if strategy == "random":
        return random_mask(rows, cols, count, *key)
    if strategy == "attention":
        even = np.ones(rows * cols) if attention is None else attention
        return attention_mask(rows, cols, count, even, *key)
    raise SettingsError(
        f"unknown mask strategy {strategy!r}", where="mask.strategy", fix="use block, random or attention"
    )


def random_mask(rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """Patches masked independently."""
    mask = np.zeros(rows * cols, dtype=bool)
    mask[keyed_permutation(rows * cols, *key)[:count]] = True
    return mask.reshape(rows, cols)


def attention_mask(rows: int, cols: int, count: int, attention: np.ndarray, *key: str | int) -> np.ndarray:
    """Draws visible patches one by one without replacement, with probabilities proportional to attention (MILAN's
    semantic aware sampling): patches that the teacher attends to tend to be visible.

    Stored attention is rounded to 255 steps; 0 counts as a quarter of a step.
    """
    weights = np.maximum(attention.astype(np.float64), 0.25 if attention.dtype == np.uint8 else 1e-12)
    # Sorting exponential variables of these rates is such a draw.
    clocks = -np.log1p(-keyed_uniforms(rows * cols, *key)) / weights
    mask = np.zeros(rows * cols, dtype=bool)
    mask[np.argsort(clocks, kind="stable")[rows * cols - count :]] = True
    return mask.reshape(rows, cols)


def block_mask(rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """BEiT's random blocks (paper, section 2.3); single patches fill what ``place_blocks`` leaves."""
    bits = functools.reduce(operator.or_, place_blocks(rows, cols, count, *key), 0)
    data = np.frombuffer(bits.to_bytes(-(-rows * cols // 8), "little"), dtype=np.uint8)
    flat = np.unpackbits(data, count=rows * cols, bitorder="little").astype(bool)
    if left := count - bits.bit_count():
        free = np.flatnonzero(~flat)
        flat[free[keyed_permutation(len(free), *key, "rest")[:left]]] = True
    return flat.reshape(rows, cols)


def place_blocks(rows: int, cols: int, count: int, *key: str | int) -> list[int]:
    """Blocks that together cover ``count`` patches, or fewer if no further block fits.

    A block's area is uniform between 16 and the remaining count, its aspect ratio log-uniform. It is accepted if it is
    smaller than the grid and adds between 1 and the remaining count. The released code tries ten times per block and
    then starts the same block again; tries are independent, so here they simply follow each other.

    Returns:
        Each block as the bits of one integer, row by row: faster than array slices for this few patches.
    """
    blocks: list[int] = []
    covered, remaining = 0, count
    columns = _columns(rows, cols)
    stretch = -math.log(SMALLEST_ASPECT)
    for lot in range(LOTS):
        # Uniforms are drawn in batches: one call to the generator costs as much as the whole search for a block.
        uniforms = keyed_uniforms(4 * TRIES, *key, lot).tolist()
        for first in range(0, 4 * TRIES, 4):
            if not remaining:
                return blocks
            area = SMALLEST_BLOCK + uniforms[first] * (remaining - SMALLEST_BLOCK)
            aspect = math.exp((2 * uniforms[first + 1] - 1) * stretch)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < cols):
                continue
            top = int(uniforms[first + 2] * (rows - height + 1))
            left = int(uniforms[first + 3] * (cols - width + 1))
            block = ((1 << width) - 1) * columns[height] << (top * cols + left)
            added = (block & ~covered).bit_count()
            if 0 < added <= remaining:
                blocks.append(block)
                covered |= block
                remaining -= added
    return blocks


@functools.lru_cache
def _columns(rows: int, cols: int) -> tuple[int, ...]:
    """For every height up to ``rows``: the leftmost patches of that many rows, as bits."""
    return tuple(sum(1 << (cols * row) for row in range(height)) for height in range(rows + 1))


def split_indices(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of visible and of masked patches, row by row, int64, each sorted."""
    flat = mask.reshape(-1)
    return np.flatnonzero(~flat), np.flatnonzero(flat)
