"""Which patches are masked. numpy only: masks are drawn in the loader's workers."""

from __future__ import annotations

import functools
import math
import operator

import numpy as np

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.keyed import keyed_permutation, keyed_uniforms

SMALLEST_BLOCK = 16
"""Patches of the smallest block drawn, as long as that many are still to be masked."""
SMALLEST_ASPECT = 0.3
"""Blocks' height / width is log-uniform between this and its inverse."""
TRIES = 32
"""Blocks tried from one lot of uniforms: six masks in seven take no second lot."""
LOTS = 20
"""Lots after which single patches fill what is left: all but never reached at the paper's ratios."""


def draw_mask(
    strategy: str, rows: int, cols: int, count: int, *key: str | int, attention: np.ndarray | None = None
) -> np.ndarray:
    """A mask with exactly ``count`` patches masked, bool (rows, cols), drawn from ``key`` and ``attention`` alone.

    Args:
        strategy: ``block``, ``random`` or ``attention``.
        rows, cols: the grid of patches.
        count: masked patches, below rows x cols.
        key: what the draw depends on, such as ("mask", seed, epoch, sample key).
        attention: (rows x cols,), not negative: for ``attention``. None: equal everywhere.

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
        f"there is no mask strategy {strategy!r}", where="mask.strategy", fix="use block, random or attention"
    )


def random_mask(rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """Independent patches."""
    mask = np.zeros(rows * cols, dtype=bool)
    mask[keyed_permutation(rows * cols, *key)[:count]] = True
    return mask.reshape(rows, cols)


def attention_mask(rows: int, cols: int, count: int, attention: np.ndarray, *key: str | int) -> np.ndarray:
    """Visible patches are drawn one after the other without replacement, each with a probability in proportion to its
    attention among those left (MILAN's semantic aware sampling): what the teacher looks at tends to be seen.

    Stored attention is rounded to 255 steps: what came out as 0 counts as a quarter of one.
    """
    weights = np.maximum(attention.astype(np.float64), 0.25 if attention.dtype == np.uint8 else 1e-12)
    # The order in which exponential clocks of these rates ring is such a draw.
    clocks = -np.log1p(-keyed_uniforms(rows * cols, *key)) / weights
    mask = np.zeros(rows * cols, dtype=bool)
    mask[np.argsort(clocks, kind="stable")[rows * cols - count :]] = True
    return mask.reshape(rows, cols)


def block_mask(rows: int, cols: int, count: int, *key: str | int) -> np.ndarray:
    """BEiT's random blocks (paper, section 2.3); single patches fill what ``place_blocks`` had to leave."""
    bits = functools.reduce(operator.or_, place_blocks(rows, cols, count, *key), 0)
    data = np.frombuffer(bits.to_bytes(-(-rows * cols // 8), "little"), dtype=np.uint8)
    flat = np.unpackbits(data, count=rows * cols, bitorder="little").astype(bool)
    if left := count - bits.bit_count():
        free = np.flatnonzero(~flat)
        flat[free[keyed_permutation(len(free), *key, "rest")[:left]]] = True
    return flat.reshape(rows, cols)


def place_blocks(rows: int, cols: int, count: int, *key: str | int) -> list[int]:
    """Blocks that together cover ``count`` patches, or fewer where none fits any more.

    A block's area is uniform between 16 and what remains, its aspect log-uniform; it is accepted if it is smaller than
    the grid and adds between 1 and what remains. The released code tries ten times a block and then begins the same
    block again: no try hangs on the one before, so that here they simply follow each other.

    Returns:
        Each block as the bits of one integer, row by row: quicker than slices of an array on so few patches.
    """
    blocks: list[int] = []
    covered, remaining = 0, count
    columns = _columns(rows, cols)
    stretch = -math.log(SMALLEST_ASPECT)
    for lot in range(LOTS):
        # Uniforms come in lots: one call to the generator costs as much as the whole search for a block.
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
    """For every height up to ``rows``: the leftmost patch of that many rows, as bits."""
    return tuple(sum(1 << (cols * row) for row in range(height)) for height in range(rows + 1))


def split_indices(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of visible and of masked patches, row by row, int64, each sorted."""
    flat = mask.reshape(-1)
    return np.flatnonzero(~flat), np.flatnonzero(flat)
