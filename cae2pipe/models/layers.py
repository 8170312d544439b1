"""Layers shared by encoder, regressor and decoders: attention, MLP, LayerScale, drop path, initialisation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cae2pipe.models.places import Places
from cae2pipe.models.relative_positions import score_bias
from cae2pipe.models.rotary_positions import turned

EPS = 1e-6
"""Epsilon of every LayerNorm (released code)."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, bias: Tensor | None = None, places: Places | None = None
) -> Tensor:
    """Multi-head attention of q (B, Q, C) over k and v (B, K, C), to (B, Q, C). C is a multiple of ``heads``. ``bias``:
    (B, H, Q, K), or without B, is added to the scores. ``places``: of which the rotations turn q and k."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if places and places.queries is not None and places.keys is not None:
        q, k = turned(q, places.queries), turned(k, places.keys)
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, P, D) at indices (B, L), which are unique within each row, to (B, L, D).

    Selects rows of the flattened (B * P, D) tensor instead of gathering elements. On a CPU this is 3 times as fast
    including the backward pass (64 x 196 tokens of 384, half of them selected, two x86-64 cores). On CUDA the
    deterministic backward pass sorts B x L indices instead of B x L x D.
    """
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * tokens.shape[1]
    chosen: Tensor = tokens.flatten(0, 1).index_select(0, (indices + rows).flatten()).unflatten(0, indices.shape)
    return chosen


def drop_path(x: Tensor, factor: Tensor | None) -> Tensor:
    """A residual branch (B, L, C) times each sample's factor (B,) from ``drop_factors``; None: unchanged."""
    return x if factor is None else x * factor.to(x.dtype).view(-1, 1, 1)


def drop_factors(uniforms: Tensor, rates: Tensor) -> Tensor:
    """Factors of the residual branches, (B, n): 0 where a uniform (B, n) is below its rate (n,), otherwise 1 / (1 -
    rate).

    The caller gives the uniforms. They depend on the step and the stream, so a batch split over any number of devices
    drops the same branches.
    """
    return (uniforms >= rates) / (1 - rates)


def drop_rates(largest: float, depth: int) -> Tensor:
    """Rates of both branches of each of ``depth`` blocks (2 depth,), linear from 0 to ``largest``."""
    rates = [largest * number / max(1, depth - 1) for number in range(depth)]
    return torch.tensor(rates).repeat_interleave(2)


def run_block(block: nn.Module, again: bool, *inputs: Tensor | Places | None) -> Tensor:
    """A block's output; ``again``: keep only its inputs, and recompute the rest in the backward pass."""
    if not again:
        output: Tensor = block(*inputs)
        return output
    # Nothing in a block draws random numbers.
    recomputed: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return recomputed


class Stack(nn.Module):
    """A module with a sequence of blocks, each with two residual branches, whose drop path rates rise linearly.

    ``checkpointing``: in training, activations inside blocks are recomputed in the backward pass, not kept.
    """

    blocks: nn.ModuleList
    drop_rates: Tensor
    checkpointing = False

    def stack(self, blocks: Iterable[nn.Module], drop: float) -> None:
        """Register the blocks; ``drop`` is the rate of the last one."""
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("drop_rates", drop_rates(drop, len(self.blocks)), persistent=False)

    @property
    def drop_columns(self) -> int:
        """Columns of drop path uniforms that ``forward`` takes."""
        return 2 * len(self.blocks)

    def run(self, x: Tensor, drop: Tensor | None, *context: Tensor | Places | None) -> Tensor:
        """All blocks applied to a residual stream (B, L, W). ``drop``: (B, drop_columns) uniforms; with None or in eval
        mode no drop path. ``context``: further inputs of every block."""
        factors = None if drop is None or not self.training else drop_factors(drop, self.drop_rates)
        for number, block in enumerate(self.blocks):
            own = None if factors is None else factors[:, 2 * number : 2 * number + 2]
            x = run_block(block, self.checkpointing and self.training, x, *context, own)
        return x


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for Linears (released code). For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Biased(nn.Module):
    """Attention with a table of biases by relative position, zero at first, if ``offsets``, its rows, is above 0."""

    relative_position_bias_table: Tensor | None

    def add_table(self, offsets: int, heads: int) -> None:
        self.register_parameter(
            "relative_position_bias_table", nn.Parameter(torch.zeros(offsets, heads)) if offsets else None
        )

    def bias(self, places: Places | None) -> Tensor | None:
        """``score_bias`` of the pairs; None without a table."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        pairs = places.pairs if places else None
        assert pairs is not None, "a stack with tables gives its blocks the pairs"
        return score_bias(table, pairs)


class SelfAttention(Biased):
    """Multi-head self-attention (B, L, W) to (B, L, W), with biases on q and v only."""

    def __init__(self, width: int, heads: int, offsets: int = 0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.add_table(offsets, heads)

    def qkv_bias(self) -> Tensor:
        """The bias of the joint projection (3 W,): zero for k, whose bias would cancel in the softmax."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, places: Places | None = None) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv_bias()).chunk(3, dim=-1)
        projected: Tensor = self.proj(attend(q, k, v, heads=self.heads, bias=self.bias(places), places=places))
        return projected


class CrossAttention(Biased):
    """Multi-head attention of q (B, Q, W) over k, v (B, K, W), with biases on q and v only.

    A head has width // heads features: if that leaves a remainder, q, k and v are narrower than the stream.
    """

    def __init__(self, width: int, heads: int, offsets: int = 0):
        super().__init__()
        self.heads = heads
        inner = width // heads * heads
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(inner, width)
        self.add_table(offsets, heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Places | None = None) -> Tensor:
        q = F.linear(q, self.q.weight, self.q_bias)
        v = F.linear(v, self.v.weight, self.v_bias)
        bias = self.bias(places)
        projected: Tensor = self.proj(attend(q, self.k(k), v, heads=self.heads, bias=bias, places=places))
        return projected


class Mlp(nn.Module):
    """Two layers with an exact GELU in between; the hidden layer is four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
