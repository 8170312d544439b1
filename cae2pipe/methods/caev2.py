"""CAE v2: encoder on visible patches, regressor for masked ones, one head for both (paper, section 2.2)."""

from __future__ import annotations

from torch import Tensor

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, bridge, latent_head, regressor_stack


class CAEv2(Method):
    """The student in training: its regressor is ``settings.predictor_*``."""

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__(settings)
        width = self.token_width = settings.predictor_width
        # From the encoder to regressor and head, if their widths differ (Tiny).
        self.bridge = bridge(settings.width, width)
        self.regressor = regressor_stack(settings) if settings.predictor_depth else None
        self.head = latent_head(settings, width, target_dim)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        drops = self.split_drop(drop)
        tokens = self.bridge(self.encoder(pixels, visible, drops[0]))
        seen, hidden = self.head(tokens), None
        if self.regressor is not None:
            hidden = self.head(self.regressor(tokens[:, 1:], visible, masked, drops[1]))
        return Prediction(seen[:, :1], seen[:, 1:], hidden, summary=self.summarise(tokens[:, :1]))
