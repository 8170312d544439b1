"""The encoder as a plain timm ViT: ``encoder.safetensors`` and the ``config.json`` that timm's ``local-dir:`` reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.tensors import write_safetensors
from cae2pipe.images.normalise import Normalise
from cae2pipe.models.description import TimmConfig
from cae2pipe.models.encoder import Block, Encoder
from cae2pipe.models.formats import TABLE, Shape, config_of

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""The student's normalisation of pixels in [0, 1]: ImageNet's (released code)."""

WEIGHTS, CONFIG = "encoder.safetensors", "config.json"


def student_normalise(device: torch.device | None = None) -> Normalise:
    """The normalisation of a student's input in pretraining."""
    return Normalise(PIXEL_MEAN, PIXEL_STD, device, unit_range=True)


def export_encoder(encoder: Encoder, folder: Path) -> None:
    """Write the encoder for ``timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)``."""
    write_safetensors(folder / WEIGHTS, timm_state(encoder), {"format": "pt"})
    text = json.dumps(timm_config(encoder), indent=1)
    write_bytes(folder / CONFIG, text.encode() + b"\n")


@torch.no_grad()
def timm_state(encoder: Encoder) -> dict[str, Tensor]:
    """Weights under timm's names, float32 on the CPU: those of its plain ViT, where the biases of q and v become one
    bias with zeros for k, or with relative or rotary positions those of its BEiT and its EVA, which have them."""
    assert encoder.patch_embed.bias is not None
    state: dict[str, Tensor] = {
        "cls_token": encoder.cls_token,
        "pos_embed": encoder.pos_embed,
        "patch_embed.proj.weight": encoder.patch_embed.weight,
        "patch_embed.proj.bias": encoder.patch_embed.bias,
        "norm.weight": encoder.norm.weight,
        "norm.bias": encoder.norm.bias,
    }
    for number, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        parts = {
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "attn.qkv.weight": block.attn.qkv.weight,
            "attn.proj.weight": block.attn.proj.weight,
            "attn.proj.bias": block.attn.proj.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
            "mlp.fc1.weight": block.mlp.fc1.weight,
            "mlp.fc1.bias": block.mlp.fc1.bias,
            "mlp.fc2.weight": block.mlp.fc2.weight,
            "mlp.fc2.bias": block.mlp.fc2.bias,
        }
        table = block.attn.relative_position_bias_table
        if table is None and encoder.places.turns is None:
            parts["attn.qkv.bias"] = block.attn.qkv_bias()
            parts |= {"ls1.gamma": block.ls1.gamma, "ls2.gamma": block.ls2.gamma}
        else:
            parts |= {"attn.q_bias": block.attn.q_bias, "attn.v_bias": block.attn.v_bias}
            parts |= {"gamma_1": block.ls1.gamma, "gamma_2": block.ls2.gamma}
            if table is not None:
                parts[TABLE] = table
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in sorted(state.items())}


def timm_config(encoder: Encoder) -> TimmConfig:
    """timm's ``config.json``: the architecture with its arguments, and how to prepare its input."""
    return config_of(
        Shape(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            width=encoder.width,
            depth=len(encoder.blocks),
            heads=encoder.heads,
            mean=PIXEL_MEAN,
            std=PIXEL_STD,
            layer_scale=True,
            relative_positions=encoder.places.pairs is not None,
            rotary_positions=encoder.places.turns is not None,
        )
    )
