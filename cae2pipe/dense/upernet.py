"""UperNet with an auxiliary head on the pyramid of a vision transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.dense.pyramid import Pyramid
from cae2pipe.runtime.device import exact_float32

IGNORED = 255
"""The label of ignored pixels."""
AUXILIARY_WIDTH = 256


class UperNet(nn.Module):
    """Normalised images (B, 3, H, W) to float32 logits (B, classes, H, W); in training also those of the auxiliary
    head.

    The decoder is segmentation-models-pytorch's, without its norms of the input maps, as in mmsegmentation, which also
    gives the initial weights. Logits are resized bilinearly to the input's size.

    Args:
        pyramid: the encoder. classes: number of classes. width: channels of the decoder. dropout: before the
        classifiers. auxiliary: whether there is a head on the third map.
    """

    def __init__(self, pyramid: Pyramid, classes: int, width: int, *, dropout: float, auxiliary: bool):
        super().__init__()
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.pyramid = pyramid
        # The first two entries stand for maps at strides 1 and 2, which UperNet does not read.
        self.decoder = UPerNetDecoder([0, 0, *[pyramid.width] * 4], encoder_depth=5, decoder_channels=width)
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in self.decoder.feature_norms)
        self.head = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1))
        self.auxiliary = auxiliary_head(pyramid.width, classes, dropout) if auxiliary else None
        for part in (self.decoder, self.head, self.auxiliary):
            if part is not None:
                initialise_convolutions(part)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        # Only the pyramid's call in training may be compiled: in scoring the last batch of windows is smaller.
        maps = self.pyramid(images) if self.training else self.pyramid.forward(images)
        size = images.shape[-2:]
        decoded = self.decoder([None, None, *maps])
        with exact_float32(images.device):
            logits = resized(self.head(decoded.float()), size)
        if self.auxiliary is None or not self.training:
            return logits, None
        return logits, resized(self.auxiliary(maps[2]), size)


def auxiliary_head(width: int, classes: int, dropout: float) -> nn.Sequential:
    """One convolution and a classifier (FCN)."""
    return nn.Sequential(
        nn.Conv2d(width, AUXILIARY_WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(AUXILIARY_WIDTH),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(AUXILIARY_WIDTH, classes, 1),
    )


def initialise_convolutions(part: nn.Module) -> None:
    """Draw the weights of a head: normal of std 0.01 and a zero bias in the classifier, which is the only convolution
    with a bias; He's normal by the number of outputs in the others (mmsegmentation)."""
    for layer in part.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def segmentation_loss(outputs: tuple[Tensor, Tensor | None], labels: Tensor, auxiliary: float) -> Tensor:
    """Mean cross-entropy over all pixels, where ignored pixels count as zero, plus the auxiliary head's times its
    weight.

    Args:
        outputs: logits (B, C, H, W) of both heads. labels: int64 (B, H, W), ``IGNORED`` for ignored pixels.
    """
    losses = [
        F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
        for logits in outputs
        if logits is not None
    ]
    return losses[0] + auxiliary * losses[1] if len(losses) > 1 else losses[0]


def spread_norms(model: nn.Module, ranks: int, device: torch.device) -> Any:
    """Synchronise BatchNorm's statistics over all processes if the device supports it (CUDA). This exchange is excluded
    from compilation, since torch.compile cannot trace it (pytorch#161302)."""
    if ranks == 1 or device.type != "cuda":
        return model
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    return model
