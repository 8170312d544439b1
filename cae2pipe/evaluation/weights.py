"""Saving of trained weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cae2pipe.artifacts.tensors import write_safetensors


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's weights and running statistics as safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_safetensors(path, weights, {"format": "pt"})
