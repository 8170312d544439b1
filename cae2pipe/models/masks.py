"""Which patches are masked. numpy only: masks are drawn in the loader's workers."""

from __future__ import annotations

import math

import numpy as np

from cae2pipe.errors import SettingsError
from cae2pipe.keyed import keyed_permutation, keyed_uniforms

SMALLEST_BLOCK = 16
"""Patches of the smallest block drawn, as long as that many are still to be masked."""
SMALLEST_ASPECT = 0.3
"""Blocks' height / width is log-uniform between this and its inverse."""
TRIES = 10
"""Blocks tried before the next one is drawn afresh."""
ROUNDS = 64
"""Rounds of ``TRIES`` after which single patches fill what is left: never reached at the paper's ratios."""


def draw_mask(strategy: str, rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """A mask with exactly ``count`` patches masked, bool (rows, cols), drawn from ``key`` alone.

    Args:
        strategy: ``block`` or ``random``.
        rows, cols: the grid of patches.
        count: masked patches, below rows x cols.
        key: what the draw depends on, such as ("mask", seed, epoch, sample key).

    Raises:
        SettingsError: unknown strategy.
    """
    if strategy == "block":
        return block_mask(rows, cols, count, *key)
    if strategy == "random":
        return random_mask(rows, cols, count, *key)
    raise SettingsError(f"there is no mask strategy {strategy!r}", where="mask.strategy", fix="use block or random")


def random_mask(rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """Independent patches."""
    mask = np.zeros(rows * cols, dtype=bool)
    mask[keyed_permutation(rows * cols, *key)[:count]] = True
    return mask.reshape(rows, cols)


def block_mask(rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """BEiT's random blocks, until exactly ``count`` patches are masked (paper, section 2.3; released code).

    A block's area is uniform between 16 and what remains, its aspect log-uniform; it is accepted if it is smaller than
    the grid and adds between 1 and what remains.
    """
    mask = np.zeros((rows, cols), dtype=bool)
    stretch = -math.log(SMALLEST_ASPECT)
    masked = 0
    for attempt in range(ROUNDS):
        # Uniforms come in lots: one call to the generator costs as much as the whole search for a block.
        uniforms = keyed_uniforms(4 * TRIES, *key, attempt).tolist()
        for place in range(0, 4 * TRIES, 4):
            remaining = count - masked
            if not remaining:
                return mask
            area = SMALLEST_BLOCK + uniforms[place] * (remaining - SMALLEST_BLOCK)
            aspect = math.exp((2 * uniforms[place + 1] - 1) * stretch)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < cols):
                continue
            top = int(uniforms[place + 2] * (rows - height + 1))
            left = int(uniforms[place + 3] * (cols - width + 1))
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= remaining:
                block[:] = True
                masked += added
    free = np.flatnonzero(~mask)
    chosen = keyed_permutation(len(free), *key, "rest")[: count - masked]
    mask.reshape(-1)[free[chosen]] = True
    return mask


def split_indices(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of visible and of masked patches, row by row, int64, each sorted."""
    flat = mask.reshape(-1)
    return np.flatnonzero(~flat), np.flatnonzero(flat)
