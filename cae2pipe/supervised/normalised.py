"""A network with normalisation of its input."""

from __future__ import annotations

from typing import Any

from torch import nn

from cae2pipe.images.normalise import Normalise


class Normalised(nn.Module):
    """A network with normalisation of its input."""

    def __init__(self, model: Any, normalise: Normalise):
        super().__init__()
        self.model, self.normalise = model, normalise

    def forward(self, images: Any) -> Any:
        """The network's output for images, which are normalised first."""
        return self.model(images)
