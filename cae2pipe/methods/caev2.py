"""CAE v2: encoder on visible patches, regressor for masked ones, one head for both (paper, section 2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.methods.losses import Prediction
from cae2pipe.models.encoder import build_encoder
from cae2pipe.models.layers import EPS, initialise
from cae2pipe.models.regressor import Regressor


class CAEv2(nn.Module):
    """The student in training.

    Args:
        settings: its shape.
        target_dim: D, the teacher's.
    """

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__()
        self.encoder = build_encoder(settings)
        width = settings.regressor_width
        narrow = settings.width != width
        # Between encoder and both regressor and head, where their widths differ (Tiny).
        self.bridge = (
            nn.Sequential(nn.Linear(settings.width, width), nn.LayerNorm(width, eps=EPS)) if narrow else nn.Identity()
        )
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
        linear = nn.Linear(width, target_dim)
        if settings.head == "fc-ln":
            self.head = nn.Sequential(linear, nn.LayerNorm(target_dim, eps=EPS))
        else:
            self.head = nn.Sequential(nn.LayerNorm(width, eps=EPS), linear)
        self.bridge.apply(initialise)
        self.head.apply(initialise)

    @property
    def drop_columns(self) -> int:
        """Columns of drop path uniforms that ``forward`` takes: the encoder's, then the regressor's."""
        return self.encoder.drop_columns + (self.regressor.drop_columns if self.regressor else 0)

    def recompute(self, on: bool) -> None:
        """Whether activations inside blocks are computed again in the backward pass rather than kept."""
        self.encoder.checkpointing = on
        if self.regressor is not None:
            self.regressor.checkpointing = on

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        """Predicted latents.

        Args:
            pixels: (B, 3, H, W), normalised.
            visible, masked: (B, V) and (B, M) int64 patch indices.
            drop: (B, drop_columns) uniforms in [0, 1). Ignored in eval mode.
        """
        if not self.training:
            drop = None
        split = self.encoder.drop_columns
        tokens = self.bridge(self.encoder(pixels, visible, None if drop is None else drop[:, :split]))
        seen, hidden = self.head(tokens), None
        if self.regressor is not None:
            latents = self.regressor(tokens[:, 1:], visible, masked, None if drop is None else drop[:, split:])
            hidden = self.head(latents)
        return Prediction(seen[:, :1], seen[:, 1:], hidden)
