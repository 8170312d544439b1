"""Feature distillation: intact images, every token aligned with the teacher's."""

from __future__ import annotations

from torch import Tensor

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, latent_head
from cae2pipe.models.layers import gather_tokens


class FeatureDistillation(Method):
    """The encoder sees all patches; nothing is masked.

    Source: FD (Wei et al., 2022): smooth-L1 on layer-normalised targets
    (``loss: {kind: smooth_l1, target: layer_norm, reduction: one_mean}``). The loader's mask only determines which
    tokens are reported as masked. Simplified: fixed sin-cos positions instead of shared relative ones, and smooth-L1
    with its transition at 1.
    """

    masks = False

    def __init__(self, settings: ModelSettings, target_dim: int):
        super().__init__(settings)
        self.token_width = settings.width
        self.head = latent_head(settings, settings.width, target_dim)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        tokens = self.encoder(pixels, None, drop)
        latents = self.head(tokens)
        seen, hidden = (gather_tokens(latents[:, 1:], indices) for indices in (visible, masked))
        return Prediction(latents[:, :1], seen, hidden, summary=self.summarise(tokens[:, :1]))
