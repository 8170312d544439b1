"""CAE with a teacher's latents as the target of its decoder: the baseline of CAE v2."""

from __future__ import annotations

import torch
from torch import Tensor

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, bridge, latent_head, predictor_stack, regressor_stack
from cae2pipe.models.decoder import MaskedDecoder

ALIGNMENT = 2.0
"""Weight of the alignment loss (CAE's scripts)."""


class CAE(Method):
    """Encoder, regressor, decoder: the regressor's latents of masked patches are aligned with the encoder's own, and a
    decoder over them predicts the teacher's.

    Source: Chen et al., 2023, with CLIP's latents in place of DALL-E's tokens; Figure 5 (b) and Table 1, row 1, of the
    paper. Its masked loss is ``loss.masked`` with ``loss.visible`` 0; the mean squared alignment of masked tokens is
    added with weight 2. ``settings.predictor_norm``: alignment and decoder read the regressor's latents behind a final
    LayerNorm, as in CAE; runs of earlier versions have none. Simplified: the decoder is as deep as the regressor; the
    encoder's latents of masked patches come from its current weights, without gradient, and without drop path, which
    CAE's scripts leave on there: noise in a target adds nothing but variance. Visible tokens are reported as the head
    sees them.
    """

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__(settings)
        if not settings.predictor_depth:
            raise SettingsError(
                "method cae needs a regressor", where="model.predictor_depth", fix="--set model.predictor_depth=4"
            )
        width = self.token_width = settings.predictor_width
        self.bridge = bridge(settings.width, width)
        self.regressor = regressor_stack(settings)
        self.decoder = predictor_stack(MaskedDecoder, settings)
        self.head = latent_head(settings, width, target_dim)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        first, second, third = self.split_drop(drop)
        tokens = self.bridge(self.encoder(pixels, visible, first))
        latents = self.regressor(tokens[:, 1:], visible, masked, second)
        with torch.no_grad():
            own = self.bridge(self.encoder(pixels, masked))[:, 1:]
        alignment = (latents.float() - own.float()).square().mean(dim=-1)
        seen = self.head(tokens)
        return Prediction(
            seen[:, :1],
            seen[:, 1:],
            self.head(self.decoder(latents, masked, third)),
            ALIGNMENT * alignment,
            self.summarise(tokens[:, :1]),
        )
