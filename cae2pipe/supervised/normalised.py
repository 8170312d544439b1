"""A network with the normalisation of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Normalised(nn.Module):
    """A network with the normalisation of its input, of pixels in [0, 255], uint8 or float."""

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * torch.tensor(mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std, device=device).view(1, 3, 1, 1), persistent=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std

    def forward(self, images: Any) -> Any:
        """What the network makes of normalised images."""
        return self.model(images)
