"""Decoders: self-attention over visible latents and mask tokens (MAE) or over masked latents only (CAE), and attention
of mask tokens to visible latents that are not updated (MILAN)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cae2pipe.models.encoder import Block
from cae2pipe.models.layers import (
    EPS,
    CrossAttention,
    LayerScale,
    Mlp,
    Stack,
    drop_path,
    initialise,
)
from cae2pipe.models.positions import sincos_positions
from cae2pipe.models.truncated_normal import truncated_normal


class MaskedDecoder(Stack):
    """Pre-norm blocks and a final norm over latents of masked patches (CAE)."""

    def __init__(self, *, width: int, depth: int, heads: int, grid: int, layer_scale: float = 0.1, drop: float = 0.0):
        super().__init__()
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(grid, grid, width))
        self.stack((Block(width, heads, layer_scale) for _ in range(depth)), drop)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.apply(initialise)

    def forward(self, latents: Tensor, masked: Tensor, drop: Tensor | None = None) -> Tensor:
        """Decoded latents (B, M, W) of latents (B, M, W) of the patches ``masked`` (B, M)."""
        decoded: Tensor = self.norm(self.run(latents + self.pos_embed[masked], drop, None))
        return decoded


class Decoder(MaskedDecoder):
    """The same over class token, visible latents and a mask token for each masked patch (MAE)."""

    def __init__(self, *, width: int, depth: int, heads: int, grid: int, layer_scale: float = 0.1, drop: float = 0.0):
        super().__init__(width=width, depth=depth, heads=heads, grid=grid, layer_scale=layer_scale, drop=drop)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        truncated_normal(self.mask_token)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """Latents of all tokens.

        Args:
            tokens: (B, 1 + V, W), the class token and the visible patches.
            visible, masked: (B, V) and (B, M) int64 patch indices.
            drop: (B, drop_columns) uniforms; None: no drop path.

        Returns:
            (B, 1 + V + M, W): class token, visible, masked.
        """
        seen = tokens[:, 1:] + self.pos_embed[visible]
        hidden = self.mask_token.to(tokens.dtype) + self.pos_embed[masked]
        x = torch.cat([tokens[:, :1].to(seen.dtype), seen, hidden.to(seen.dtype)], dim=1)
        decoded: Tensor = self.norm(self.run(x, drop, None))
        return decoded


class PromptingBlock(nn.Module):
    """A pre-norm block whose queries are only the mask tokens; keys and values are all tokens. The caller gives the
    factors of drop path: (B, 2) or None."""

    def __init__(self, width: int, heads: int, layer_scale: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = CrossAttention(width, heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x: Tensor, prompts: Tensor, drop: Tensor | None) -> Tensor:
        first, second = (None, None) if drop is None else drop.unbind(1)
        both = self.norm1(torch.cat([prompts, x], dim=1))
        x = x + drop_path(self.ls1(self.attn(both[:, prompts.shape[1] :], both, both)), first)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), second)


class PromptingDecoder(Stack):
    """Mask tokens are updated block by block. Class token and visible latents prompt them and are never updated
    (MILAN)."""

    def __init__(self, *, width: int, depth: int, heads: int, grid: int, layer_scale: float = 0.1, drop: float = 0.0):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(grid, grid, width))
        self.stack((PromptingBlock(width, heads, layer_scale) for _ in range(depth)), drop)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.apply(initialise)
        truncated_normal(self.mask_token)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Tensor:
        """Latents of all tokens, (B, 1 + V + M, W): class token, visible, masked. Arguments as in ``Decoder``."""
        seen = tokens[:, 1:] + self.pos_embed[visible]
        prompts = torch.cat([tokens[:, :1].to(seen.dtype), seen], dim=1)
        x = (self.mask_token.to(tokens.dtype) + self.pos_embed[masked]).to(seen.dtype)
        decoded: Tensor = self.norm(torch.cat([prompts, self.run(x, drop, prompts)], dim=1))
        return decoded
