"""BEiT's architecture with a teacher's latents as targets: MVP and MaskDistill."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, latent_head
from cae2pipe.models.layers import gather_tokens
from cae2pipe.models.truncated_normal import truncated_normal


class MVP(Method):
    """Mask tokens replace masked patches inside the encoder (BEiT), whose output is aligned with CLIP's.

    Source: MVP (Wei et al., 2022), Figure 5 (c) of the paper; MaskDistill (Peng et al., 2022) is the same architecture
    with a smooth-L1 loss on layer-normalised targets (``loss: {kind: smooth_l1, target: layer_norm}``); dBOT taught by
    CLIP (Liu et al., 2024) is MVP with fewer masked patches. With ``loss.visible`` 0, as published, only masked tokens
    have a loss; with 1 all tokens. Simplified: fixed sin-cos positions, no relative bias.
    """

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__(settings)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.token_width = settings.width
        self.head = latent_head(settings, settings.width, target_dim)
        truncated_normal(self.mask_token)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        patches = self.encoder.embed(pixels)
        hidden = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device).scatter(1, masked, True)
        patches = torch.where(hidden.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        tokens = self.encoder.attend(patches + self.encoder.pos_embed[:, 1:], drop)
        latents = self.head(tokens)
        seen, masked_latents = (gather_tokens(latents[:, 1:], indices) for indices in (visible, masked))
        return Prediction(latents[:, :1], seen, masked_latents, summary=self.summarise(tokens[:, :1]))
