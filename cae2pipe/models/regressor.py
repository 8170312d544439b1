"""The latent contextual regressor: masked patches' latents from visible ones (paper, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cae2pipe.models.layers import (
    EPS,
    CrossAttention,
    LayerScale,
    Mlp,
    Stack,
    drop_path,
    initialise,
)
from cae2pipe.models.places import GridPlaces, Places
from cae2pipe.models.positions import sincos_positions
from cae2pipe.models.truncated_normal import truncated_normal


class RegressorBlock(nn.Module):
    """Mask tokens attend to visible latents and to each other. The caller gives the factors of drop path, (B, 2) or
    None, and the tokens' places if there are relative or rotary positions. ``offsets``: rows of the table of relative
    ones; 0: none.

    As in the released code, the norm before the MLP replaces the stream itself.
    """

    def __init__(self, width: int, heads: int, layer_scale: float, offsets: int = 0):
        super().__init__()
        self.norm_q = nn.LayerNorm(width, eps=EPS)
        self.norm_k = nn.LayerNorm(width, eps=EPS)
        self.norm_v = nn.LayerNorm(width, eps=EPS)
        self.attn = CrossAttention(width, heads, offsets)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        x_positions: Tensor,
        context_positions: Tensor,
        places: Places | None,
        drop: Tensor | None,
    ) -> Tensor:
        first, second = (None, None) if drop is None else drop.unbind(1)
        both = torch.cat([context, x], dim=1)
        positions = torch.cat([context_positions, x_positions], dim=1)
        attended = self.attn(self.norm_q(x + x_positions), self.norm_k(both + positions), self.norm_v(both), places)
        x = self.norm2(x + drop_path(self.ls1(attended), first))
        return x + drop_path(self.ls2(self.mlp(x)), second)


class Regressor(Stack):
    """Blocks of cross-attention whose keys and values are the visible latents, never updated, and the mask tokens.

    ``final_norm``: a LayerNorm behind the blocks, as in CAE. The released code of CAE v2 defines it too, but never uses
    it. ``relative_positions``: each block has a bias by relative position in addition, zero at first.
    ``rotary_positions``: each block turns queries and keys by their patches' rows and columns in addition.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        grid: int,
        layer_scale: float = 0.1,
        drop: float = 0.0,
        final_norm: bool = False,
        relative_positions: bool = False,
        rotary_positions: bool = False,
    ):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_positions(grid, grid, width))
        self.places = GridPlaces(
            grid,
            class_token=False,
            relative=relative_positions,
            rotary=rotary_positions,
            features=width // heads,
        )
        self.stack((RegressorBlock(width, heads, layer_scale, self.places.offsets) for _ in range(depth)), drop)
        self.norm = nn.LayerNorm(width, eps=EPS) if final_norm else nn.Identity()
        self.apply(initialise)
        truncated_normal(self.mask_token)

    def forward(self, context: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Tensor:
        """Latents of the masked patches.

        Args:
            context: (B, V, W), the visible patches' latents, without the class token.
            visible, masked: (B, V) and (B, M) int64 patch indices.
            drop: (B, drop_columns) uniforms; None: no drop path.

        Returns:
            (B, M, W).
        """
        x = self.mask_token.expand(len(context), masked.shape[1], -1)
        x_positions, context_positions = self.pos_embed[masked], self.pos_embed[visible]
        places = self.places(masked, torch.cat([visible, masked], dim=1))
        latents: Tensor = self.norm(self.run(x, drop, context, x_positions, context_positions, places))
        return latents
