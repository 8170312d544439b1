"""CAE v2: encoder on visible patches, regressor for masked ones, one head for both (paper, section 2.2)."""

from __future__ import annotations

from torch import Tensor

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, bridge, latent_head
from cae2pipe.models.regressor import Regressor


class CAEv2(Method):
    """The student in training: its regressor is ``settings.regressor_*``."""

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__(settings)
        width = settings.regressor_width
        # Between encoder and both regressor and head, where their widths differ (Tiny).
        self.bridge = bridge(settings.width, width)
        self.regressor = (
            Regressor(
                width=width,
                depth=settings.regressor_depth,
                heads=settings.regressor_heads,
                grid=settings.grid,
                layer_scale=settings.regressor_layer_scale,
                drop=settings.drop_path,
            )
            if settings.regressor_depth
            else None
        )
        self.head = latent_head(settings, width, target_dim)

    @property
    def drop_columns(self) -> int:
        """Columns of drop path uniforms that ``forward`` takes: the encoder's, then the regressor's."""
        return self.encoder.drop_columns + (self.regressor.drop_columns if self.regressor else 0)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        if not self.training:
            drop = None
        split = self.encoder.drop_columns
        tokens = self.bridge(self.encoder(pixels, visible, None if drop is None else drop[:, :split]))
        seen, hidden = self.head(tokens), None
        if self.regressor is not None:
            latents = self.regressor(tokens[:, 1:], visible, masked, None if drop is None else drop[:, split:])
            hidden = self.head(latents)
        return Prediction(seen[:, :1], seen[:, 1:], hidden)
