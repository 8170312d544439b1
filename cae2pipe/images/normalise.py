"""Normalisation of pixels for a network: every channel to mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Normalisation of pixels in [0, 255].

    ``unit_range`` divides by 255 first; without it, mean and deviation are scaled to the pixels' range instead. The two
    differ in the last bits of float32, on which the bytes of stored latents, scores and loss curves depend: teachers
    and evaluated encoders use the second, a student in pretraining the first.

    Args:
        mean, std: of each channel, for pixels in [0, 1].
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | None = None,
        *,
        unit_range: bool = False,
    ):
        super().__init__()
        self.mean, self.std, self.unit_range = tuple(mean), tuple(std), unit_range
        self.shift: Tensor
        self.scale: Tensor
        for name, values in (("shift", mean), ("scale", std)):
            channels = torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, channels if unit_range else 255 * channels, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels, float32, of pixels (B, C, H, W), uint8 or float."""
        images = pixels.float()
        if self.unit_range:
            images = images / 255
        return (images - self.shift) / self.scale
