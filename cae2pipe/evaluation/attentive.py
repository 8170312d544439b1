"""The attentive probe: a learned query attends to frozen tokens, then BatchNorm and a linear layer (CAE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.chunk_norm import ChunkNorm
from cae2pipe.models.layers import EPS, CrossAttention
from cae2pipe.models.truncated_normal import truncated_normal


class AttentiveProbe(nn.Module):
    """Tokens (B, T, D) to logits (B, classes): LayerNorms for query, keys and values, one cross-attention without a
    residual, BatchNorm without affine, a linear layer.

    Initial weights and ``eps``, BatchNorm's, are as in CAE's released code. The code itself cannot be run: its block
    does not take the arguments that it is called with.
    """

    def __init__(self, dim: int, classes: int, heads: int, *, eps: float = 1e-5):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))
        self.attention = CrossAttention(dim, heads)
        self.norm = ChunkNorm(dim, eps=eps)
        self.head = nn.Linear(dim, classes)
        for module in self.attention.modules():
            if isinstance(module, nn.Linear):
                truncated_normal(module.weight, std=0.02, cut=2)
        nn.init.zeros_(self.attention.proj.bias)
        truncated_normal(self.head.weight, std=0.01, cut=2)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm_q(self.query).expand(len(tokens), -1, -1)
        pooled = self.attention(query, self.norm_k(tokens), self.norm_v(tokens))
        logits: Tensor = self.head(self.norm(pooled[:, 0]))
        return logits


def head_count(dim: int, asked: int | None) -> int:
    """Heads of the cross-attention over ``dim`` features: the requested number, or one per 64 features.

    Raises:
        SettingsError: it does not divide the number of features.
    """
    heads = asked or max(1, dim // 64)
    if dim % heads:
        fitting = max(d for d in range(1, heads + 1) if dim % d == 0)
        raise SettingsError(
            f"{heads} heads do not divide this encoder's {dim} dimensions",
            where="heads",
            fix=f"--set heads={fitting}",
        )
    return heads
