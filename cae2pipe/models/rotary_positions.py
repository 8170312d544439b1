"""Rotary positions: queries and keys turned by angles that grow with the row and the column of their patch, so that
scores depend on the offset between two patches.

As in EVA-02; the numbers are those of timm's ``RotaryEmbeddingCat``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 10000.0


def rotations(rows: int, cols: int, features: int, *, reach: int, class_token: bool) -> Tensor:
    """Cosines and sines of the angles by which tokens of a grid are turned, float32 (2, N, D).

    Half of a head's features turn by the row, half by the column, two neighbours by one angle. The class token comes
    first, and is not turned.

    Args:
        features: D of a head, a multiple of 4.
        reach: rows and columns of the grid that positions are scaled to, as in EVA-02: that of pretraining.
    """
    bands = 1.0 / TEMPERATURE ** (torch.arange(features // 4) / (features // 4))
    down, right = (torch.outer(torch.arange(count) / count * reach, bands) for count in (rows, cols))
    angles = torch.cat([down.unsqueeze(1).expand(-1, cols, -1), right.expand(rows, -1, -1)], dim=2)
    angles = angles.flatten(0, 1).repeat_interleave(2, dim=1)
    if class_token:
        angles = F.pad(angles, (0, 0, 1, 0))
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (B, H, L, D), turned by ``rotations`` of their tokens, (2, L, D) or (2, B, L, D)."""
    cos, sin = turns if turns.ndim == 3 else turns.unsqueeze(2)
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    result: Tensor = x * cos + across * sin
    return result.to(x.dtype)
