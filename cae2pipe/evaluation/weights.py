"""Trained weights on the disk."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cae2pipe.artifacts.atomic import replacing


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's weights and running statistics as safetensors."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
