"""Where the tokens of a grid are, for attention with relative or rotary positions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from cae2pipe.models.relative_positions import chosen_pairs, relative_index, table_rows
from cae2pipe.models.rotary_positions import rotations


class Places(NamedTuple):
    """``pairs``: the row of the table of biases for each query and key, (Q, K) or (B, Q, K). ``queries``, ``keys``:
    their ``rotations``, (2, L, D) or (2, B, L, D)."""

    pairs: Tensor | None
    queries: Tensor | None
    keys: Tensor | None


class GridPlaces(nn.Module):
    """The places of all tokens of a square grid, from which those of some are taken.

    Args:
        class_token: whether one comes first. relative: whether there are biases by relative position. rotary: whether
        queries and keys are turned. features: of a head.
    """

    pairs: Tensor | None
    turns: Tensor | None

    def __init__(self, grid: int, *, class_token: bool, relative: bool, rotary: bool, features: int):
        super().__init__()
        index = relative_index(grid, grid, reach=grid, class_token=class_token) if relative else None
        turns = rotations(grid, grid, features, reach=grid, class_token=class_token) if rotary else None
        self.register_buffer("pairs", index, persistent=False)
        self.register_buffer("turns", turns, persistent=False)
        self.offsets = table_rows(grid, class_token=class_token) if relative else 0
        """Rows of the table of biases; 0: none."""

    def forward(self, queries: Tensor | None = None, keys: Tensor | None = None) -> Places | None:
        """The places of the tokens queries (B, Q) and keys (B, K), int64; without them, of all. None: attention needs
        none."""
        if self.pairs is None and self.turns is None:
            return None
        if queries is None or keys is None:
            return Places(self.pairs, self.turns, self.turns)
        return Places(
            None if self.pairs is None else chosen_pairs(self.pairs, queries, keys),
            None if self.turns is None else self.turns[:, queries],
            None if self.turns is None else self.turns[:, keys],
        )
