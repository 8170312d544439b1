"""The student's encoder: a ViT on the visible patches only (paper, section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.models.layers import (
    EPS,
    LayerScale,
    Mlp,
    SelfAttention,
    Stack,
    drop_path,
    gather_tokens,
    initialise,
)
from cae2pipe.models.places import GridPlaces, Places
from cae2pipe.models.positions import sincos_positions
from cae2pipe.models.truncated_normal import truncated_normal


def build_encoder(settings: ModelSettings) -> Encoder:
    """The encoder that the settings describe, freshly initialised."""
    return Encoder(
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        layer_scale=settings.layer_scale,
        drop=settings.drop_path,
        relative_positions=settings.relative_positions,
        rotary_positions=settings.rotary_positions,
    )


class Block(nn.Module):
    """Pre-norm attention and MLP, each with LayerScale and drop path. The caller gives its factors, (B, 2) or None, and
    the tokens' places if there are relative or rotary positions. ``offsets``: rows of the table of relative ones; 0:
    none."""

    def __init__(self, width: int, heads: int, layer_scale: float, offsets: int = 0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(width, heads, offsets)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x: Tensor, places: Places | None, drop: Tensor | None) -> Tensor:
        first, second = (None, None) if drop is None else drop.unbind(1)
        x = x + drop_path(self.ls1(self.attn(self.norm1(x), places)), first)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), second)


class Encoder(Stack):
    """A ViT with fixed sin-cos positions and a class token, whose position is zero.

    Args:
        width, depth, heads: shape of the blocks.
        image_size, patch_size: in pixels.
        layer_scale: initial LayerScale.
        drop: largest drop path rate.
        relative_positions: whether each block has a bias by relative position in addition, zero at first.
        rotary_positions: whether each block turns queries and keys by their patches' rows and columns in addition.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        image_size: int = 224,
        patch_size: int = 16,
        layer_scale: float = 0.1,
        drop: float = 0.0,
        relative_positions: bool = False,
        rotary_positions: bool = False,
    ):
        super().__init__()
        self.width, self.heads = width, heads
        self.image_size, self.patch_size = image_size, patch_size
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        grid = image_size // patch_size
        positions = torch.cat([torch.zeros(1, width), sincos_positions(grid, grid, width)])
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions.unsqueeze(0))
        self.places = GridPlaces(
            grid,
            class_token=True,
            relative=relative_positions,
            rotary=rotary_positions,
            features=width // heads,
        )
        self.stack((Block(width, heads, layer_scale, self.places.offsets) for _ in range(depth)), drop)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.apply(initialise)
        truncated_normal(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        truncated_normal(self.cls_token)

    def forward(self, pixels: Tensor, visible: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Tokens after the final norm.

        Args:
            pixels: (B, 3, H, W), normalised.
            visible: (B, V) int64, the visible patches; None: all.
            drop: (B, drop_columns) uniforms in [0, 1); None: no drop path.

        Returns:
            (B, 1 + V, W): the class token, then the visible patches in the order given.
        """
        x = self.embed(pixels) + self.pos_embed[:, 1:]
        if visible is not None:
            x = gather_tokens(x, visible)
        return self.attend(x, drop, visible)

    def embed(self, pixels: Tensor) -> Tensor:
        """Patch embeddings (B, P, W) of pixels (B, 3, H, W), without positions."""
        patches: Tensor = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        return patches

    def attend(self, x: Tensor, drop: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Prepends the class token to patches with positions (B, L, W), and applies all blocks and the final norm: (B,
        1 + L, W). ``drop`` and ``visible`` as in ``forward``."""
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        own = None if visible is None else F.pad(visible + 1, (1, 0))
        tokens: Tensor = self.norm(self.run(x, drop, self.places(own, own)))
        return tokens
