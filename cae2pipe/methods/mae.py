"""MAE: a decoder over visible latents and mask tokens predicts the teacher's latents, or pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, bridge, latent_head, predictor_stack
from cae2pipe.models.decoder import Decoder, PromptingDecoder


class MAE(Method):
    """A decoder with self-attention over visible latents and mask tokens, all of which it updates.

    Source: He et al., 2022; Figure 5 (d) of the paper. Decoder depth, width and heads are ``predictor_*``. Targets are
    CLIP's latents, or with ``loss: {target: pixels, kind: mse}`` the patches' own normalised pixels, as published,
    without a teacher. With ``loss.visible`` 0, as in MAE, only masked tokens have a loss; with 1 also the decoder's
    visible tokens. dBOT (Liu et al., 2024) is the same graph with ``loss: {kind: smooth_l1, beta: 2, target:
    layer_norm, class_token: masked}``, and latents from in front of its teacher's final norm. Simplified: with
    LayerScale and without a bias of k, as all encoders here; with pixels the class token has no loss.
    """

    decoder_class: type[Decoder | PromptingDecoder] = Decoder

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__(settings)
        if not settings.predictor_depth:
            raise SettingsError(
                "method mae needs a decoder of at least one block",
                where="model.predictor_depth",
                fix="--set model.predictor_depth=1",
            )
        self.bridge = bridge(settings.width, settings.predictor_width)
        self.decoder = predictor_stack(self.decoder_class, settings)
        self.token_width = settings.predictor_width
        self.head = latent_head(settings, settings.predictor_width, target_dim)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        first, second = self.split_drop(drop)
        tokens = self.bridge(self.encoder(pixels, visible, first))
        predicted = self.decoder(tokens, visible, masked, second)
        latents = self.head(predicted)
        seen, hidden = torch.split(latents[:, 1:], [visible.shape[1], masked.shape[1]], dim=1)
        return Prediction(latents[:, :1], seen, hidden, summary=self.summarise(predicted[:, :1]))
