"""A truncated normal that draws the same values in every version of torch, unlike ``nn.init.trunc_normal_``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def truncated_normal(tensor: Tensor, std: float = 0.02, cut: float = 0.02) -> Tensor:
    """Fill with a normal of mean 0 cut at ``-cut`` and ``cut``, from the CPU's generator whatever the tensor's device.

    By default as the released code does, where the std that results is 0.0108. One uniform number is drawn for each
    element, and the inverse of the normal's distribution function is taken of it in float64: implementations of it
    differ in their last digits, which the tensor's own type then rounds away.

    Returns:
        The tensor. Meta tensors are left alone, and nothing is drawn for them.
    """
    if tensor.is_meta:
        return tensor
    # 2 cdf(x) - 1 of a standard normal is erf(x / sqrt(2)).
    largest = math.erf(cut / std / math.sqrt(2))
    values = torch.empty(tensor.shape, dtype=torch.float64, device="cpu").uniform_(-largest, largest)
    # Where the cut-offs lie so far out that ``largest`` is 1, the lowest uniform number would give -inf.
    values.erfinv_().mul_(std * math.sqrt(2)).clamp_(-cut, cut)
    return tensor.copy_(values)
