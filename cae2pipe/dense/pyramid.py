"""From a plain vision transformer to four feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def taps(depth: int) -> list[int]:
    """Indices of the blocks whose outputs become maps: 3, 5, 7 and 11 of 12; 7, 11, 15 and 23 of 24 (released code)."""
    return [max(0, depth * parts // 6 - 1) for parts in (2, 3, 4, 6)]


class Pyramid(nn.Module):
    """The encoder's maps after its taps, resampled to strides 4, 8, 16 and 32 of pixels (B, 3, H, W), each (B, W, h,
    w).

    In this order: two transposed convolutions with a norm and a GELU in between, one, none, a max-pool (released code).
    The strides are for patches of 16 pixels and scale with the patch size. Blocks and norms after the last tap are
    removed from the encoder.

    Args:
        encoder: a plain vision transformer of timm. norm: from a number of channels to the norm between the
        convolutions.
    """

    def __init__(self, encoder: Any, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.taps = taps(len(encoder.blocks))
        encoder.norm = encoder.fc_norm = encoder.head = nn.Identity()
        encoder.attn_pool = None
        self.encoder = encoder
        width: int = encoder.embed_dim
        self.width = width
        self.strides = tuple(encoder.patch_embed.patch_size[0] * share for share in (0.25, 0.5, 1, 2))
        self.scalers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, 2),
                    norm(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, 2),
                ),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2),
            ]
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        # With few blocks, two taps may be the same block.
        indices = sorted(set(self.taps))
        taken = self.encoder.forward_intermediates(
            pixels, indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        maps = dict(zip(indices, taken, strict=True))
        return [scale(maps[tap]) for scale, tap in zip(self.scalers, self.taps, strict=True)]


def decay_groups(
    pyramid: Pyramid, others: nn.Module, weight_decay: float, *, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with ``lr_scale``: layer_decay^(L + 1 - i) for the encoder, where i is 0 for its embeddings and
    1 to L for its blocks; 1 for the rest of ``others``, which contains the pyramid. One-dimensional parameters have no
    weight decay. The class token and learned positions do, as in CAE's code, whose test of their names never matches.
    """
    from timm.optim import param_groups_layer_decay

    encoder = pyramid.encoder
    # timm counts layers up to the last one with weights, which is a block here.
    groups: list[dict[str, Any]] = param_groups_layer_decay(encoder, weight_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr_scale"] *= layer_decay
    known = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in others.parameters() if p.requires_grad and id(p) not in known]
    groups.append({"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay, "lr_scale": 1.0})
    groups.append({"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0})
    return groups
