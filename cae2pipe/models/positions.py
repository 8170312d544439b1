"""Fixed two-dimensional sin-cos positions."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sincos_positions(rows: int, cols: int, width: int) -> Tensor:
    """Positions of a grid of patches, row by row, (rows * cols, width) float32.

    The channels are four quarters: sines, then cosines of the row, then of the column (released code).
    """
    quarter = width // 4
    assert quarter * 4 == width, "the width must be a multiple of 4"
    frequencies = TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    by_row, by_col = (axis.reshape(-1, 1) * frequencies for axis in (row, col))
    return torch.cat([by_row.sin(), by_row.cos(), by_col.sin(), by_col.cos()], dim=1).float()
