"""A truncated normal with the same values in every version of torch, unlike ``nn.init.trunc_normal_``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def truncated_normal(tensor: Tensor, std: float = 0.02, cut: float = 0.02) -> Tensor:
    """Fill with a normal of mean 0 truncated to [-cut, cut], from the CPU's generator, whatever the tensor's device.

    The defaults are those of the released code; the resulting std is 0.0108. One uniform number is drawn per element,
    and the normal's inverse distribution function of it is computed in float64. Implementations of that function differ
    in the last digits, which rounding to the tensor's type removes.

    Returns:
        The tensor. Meta tensors are left unchanged, and nothing is drawn for them.
    """
    if tensor.is_meta:
        return tensor
    # 2 cdf(x) - 1 of a standard normal is erf(x / sqrt(2)).
    largest = math.erf(cut / std / math.sqrt(2))
    values = torch.empty(tensor.shape, dtype=torch.float64, device="cpu").uniform_(-largest, largest)
    # If the cut-offs are so far out that ``largest`` is 1, the lowest uniform number would give -inf.
    values.erfinv_().mul_(std * math.sqrt(2)).clamp_(-cut, cut)
    return tensor.copy_(values)
