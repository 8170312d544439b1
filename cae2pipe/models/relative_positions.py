"""Relative positions: a learnt bias on attention scores for each pair of tokens, by their relative position.

As in BEiT and the released code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("cae2pipe::relative_bias", mutates_args=())
def relative_bias(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    """The bias (H, N, N), contiguous, from a table (R, H) and the row of each pair of tokens (N * N,).

    A custom operator with a three-dimensional result, so that a compiler does not change its strides. Inductor chooses
    the layout of what it computes itself, and uses channels-last for four dimensions followed by a convolution. The
    attention kernels on CUDA then fail in the backward pass ("last dimension must be contiguous"; torch 2.11).
    """
    return table.t()[:, index].reshape(-1, tokens, tokens).contiguous()


@relative_bias.register_fake
def _(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    return table.new_empty(table.shape[1], tokens, tokens)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    table, index, _ = inputs
    ctx.save_for_backward(index)
    ctx.rows = table.shape[0]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    by_pair = gradient.flatten(1).t()
    table = gradient.new_zeros(ctx.rows, by_pair.shape[1])
    return table.index_put((index,), by_pair, accumulate=True), None, None


relative_bias.register_autograd(_backward, setup_context=_keep)
