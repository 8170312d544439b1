"""Relative positions: a learnt bias on attention scores for each pair of tokens, by their relative position.

As in BEiT and the released code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def table_rows(reach: int, *, class_token: bool) -> int:
    """Rows of a table for grids of up to ``reach`` rows and columns: one for each offset, and with a class token three
    for pairs with it."""
    return (2 * reach - 1) ** 2 + 3 * class_token


def relative_index(rows: int, cols: int, *, reach: int, class_token: bool) -> Tensor:
    """The row of the table for each pair of tokens of a grid, int64 (N, N), from the first to the second. ``reach``:
    the largest grid that the table is for. The class token comes first (BEiT; timm's ``gen_relative_position_index``).
    """
    row, col = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
    down, right = (axis.unsqueeze(1) - axis + reach - 1 for axis in (row, col))
    index = down * (2 * reach - 1) + right
    if class_token:
        from_it, to_it, own = range((2 * reach - 1) ** 2, table_rows(reach, class_token=True))
        index = F.pad(index, (1, 0, 1, 0))
        index[0], index[:, 0] = from_it, to_it
        index[0, 0] = own
    return index


def resized_table(table: Tensor, rows: int, cols: int) -> Tensor:
    """A table of a square grid with class token, (R, H), for another grid. As in BEiT, a bias stays near its offset in
    patches for small offsets, and larger ones are spread geometrically up to the new grid's."""
    before = (math.isqrt(len(table) - 3) + 1) // 2
    offsets = table[:-3].detach().unflatten(0, (2 * before - 1, 2 * before - 1))
    down, right = (_spread(before, after).to(table) for after in (rows, cols))
    return torch.cat([torch.einsum("ai,bj,ijh->abh", down, right, offsets).flatten(0, 1), table[-3:].detach()])


def _spread(before: int, after: int) -> Tensor:
    """Weights (2 after - 1, 2 before - 1) that interpolate biases of one axis linearly between the new places of their
    offsets, 1, 1 + q, 1 + q + q^2, ..., of which the last is the largest new offset."""

    def places(q: float) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(q ** np.arange(before - 1))])

    low, high = 1.0, float(max(2, after))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if places(middle)[-1] > after - 1 else (middle, high)
    old = places(low)
    old, new = np.concatenate([-old[:0:-1], old]), np.arange(1 - after, after)
    return torch.from_numpy(np.stack([np.interp(new, old, one) for one in np.eye(len(old))], axis=1)).float()


def chosen_pairs(index: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The rows of the table for the tokens queries (B, Q) and keys (B, K) alone, (B, Q, K), of all pairs' index (N,
    N)."""
    return index[queries.unsqueeze(2), keys.unsqueeze(1)]


def score_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias on attention scores of a table (R, H) for pairs (Q, K) or (B, Q, K): (H, Q, K) or (B, H, Q, K)."""
    bias: Tensor = relative_bias(table, index)
    return bias if index.ndim == 2 else bias.unflatten(0, (-1, len(index))).transpose(0, 1)


@torch.library.custom_op("cae2pipe::relative_bias", mutates_args=())
def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias, contiguous, from a table (R, H) and the row of each pair of tokens: (H, Q, K) of (Q, K), and (H B, Q,
    K), head by head, of (B, Q, K).

    A custom operator with a three-dimensional result, so that a compiler does not change its strides. Inductor chooses
    the layout of what it computes itself, and uses channels-last for four dimensions followed by a convolution. The
    attention kernels on CUDA then fail in the backward pass ("last dimension must be contiguous"; torch 2.11).
    """
    return table.t()[:, index.flatten()].reshape(-1, *index.shape[-2:]).contiguous()


@relative_bias.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(table.shape[1] * math.prod(index.shape[:-2]), *index.shape[-2:])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    table, index = inputs
    ctx.save_for_backward(index)
    ctx.shape = table.shape


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    rows, heads = ctx.shape
    by_pair = gradient.reshape(heads, -1).t()
    table = gradient.new_zeros(rows, heads)
    return table.index_put((index.flatten(),), by_pair, accumulate=True), None


relative_bias.register_autograd(_backward, setup_context=_keep)
