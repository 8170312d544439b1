"""An encoder in the layouts of other libraries: the names of its weights there, and the files that describe it. The
input is a state of timm's plain vision transformer, with or without LayerScale. timm keeps LayerScale; for the other
two it is folded into the preceding layers. All three layouts compute the same function (tests/models/test_formats.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cae2pipe.models.description import TimmConfig
from cae2pipe.models.layers import EPS

TABLE = "attn.relative_position_bias_table"
"""The name of a block's biases by relative position in timm's BEiT."""


@dataclass(frozen=True)
class Shape:
    """Shape of an encoder: pixels, blocks, input normalisation. ``layer_scale``, ``relative_positions``,
    ``rotary_positions``: whether blocks have LayerScale, biases by relative position, and rotary positions."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layer_scale: bool
    relative_positions: bool = False
    rotary_positions: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the central crop of ``image_size``."""
        return round(self.image_size / 0.875)


@dataclass(frozen=True)
class ExportLayout:
    """``weights``: the file's name; ``metadata``: stored in it; ``files``: JSON next to it; ``usage``: Python lines."""

    weights: str
    state: dict[str, Tensor]
    metadata: dict[str, str]
    files: dict[str, Any]
    library: str
    usage: str


def config_of(shape: Shape) -> TimmConfig:
    """timm's ``config.json``: the architecture with its arguments, and how to prepare its input."""
    # timm's plain ViT has neither biases by relative position nor rotary positions. Its BEiT and its EVA, without them,
    # are the same network.
    architecture, more = "vit_base_patch16_224", {}
    if shape.relative_positions:
        architecture = "beit_base_patch16_224"
        more = {"global_pool": "token", "use_abs_pos_emb": True, "use_rel_pos_bias": True}
    elif shape.rotary_positions:
        architecture = "eva_giant_patch14_224"
        more = {
            "global_pool": "token",
            "mlp_ratio": 4.0,
            "use_rot_pos_emb": True,
            "ref_feat_shape": shape.image_size // shape.patch_size,
        }
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": shape.width,
        "global_pool": "token",
        "model_args": {
            "img_size": shape.image_size,
            "patch_size": shape.patch_size,
            "embed_dim": shape.width,
            "depth": shape.depth,
            "num_heads": shape.heads,
            # Only enables LayerScale; its values are in the weights.
            **({"init_values": 1e-5} if shape.layer_scale else {}),
            **more,
        },
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, shape.image_size, shape.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(shape.mean),
            "std": list(shape.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def to_timm(state: Mapping[str, Tensor], shape: Shape) -> ExportLayout:
    """The layout of timm's local folders and hub repositories."""
    usage = (
        'import timm\n\nencoder = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)\n'
        "tokens = encoder.forward_features(images)  # the class token, then the patches, after the final norm"
    )
    return ExportLayout(
        "model.safetensors", dict(state), {"format": "pt"}, {"config.json": config_of(shape)}, "timm", usage
    )


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function without LayerScale: each gamma is multiplied into the preceding layer."""
    result = {name: tensor for name, tensor in state.items() if not name.endswith(".gamma")}
    for name in state.keys() - result.keys():
        block, branch, _ = name.rsplit(".", 2)
        layer = f"{block}.{'attn.proj' if branch == 'ls1' else 'mlp.fc2'}"
        result[f"{layer}.weight"] = state[name].unsqueeze(1) * state[f"{layer}.weight"]
        result[f"{layer}.bias"] = state[name] * state[f"{layer}.bias"]
    return result


def to_open_clip(state: Mapping[str, Tensor], shape: Shape) -> ExportLayout:
    """The layout of open_clip's native vision tower, for a model whose text tower is not trained yet.

    Its patch embedding has no bias, so the bias is added to the patches' positions. Its projection is the identity.
    """
    state = folded(state)
    own: dict[str, Tensor] = {
        "class_embedding": state["cls_token"].flatten(),
        "positional_embedding": state["pos_embed"][0]
        + torch.cat([torch.zeros(1, shape.width), state["patch_embed.proj.bias"].expand(shape.patches, -1)]),
        "conv1.weight": state["patch_embed.proj.weight"],
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
        "proj": torch.eye(shape.width),
    }
    names = {
        "norm1.": "ln_1.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj.": "attn.out_proj.",
        "norm2.": "ln_2.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    own |= {f"transformer.resblocks.{name}": tensor for name, tensor in _blocks(state, names).items()}
    vision = {
        "image_size": shape.image_size,
        "layers": shape.depth,
        "width": shape.width,
        "head_width": shape.width // shape.heads,
        "patch_size": shape.patch_size,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": EPS},
    }
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    config = {
        "model_cfg": {"embed_dim": shape.width, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {
            "size": shape.image_size,
            "mean": list(shape.mean),
            "std": list(shape.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    usage = (
        "import open_clip\n\nmodel, _, preprocess = open_clip.create_model_and_transforms(\n"
        '    "local-dir:FOLDER", load_weights=False, pretrained_image_path="FOLDER/visual.safetensors"\n)\n'
        "features = model.visual(images)  # the class token; the text tower is not trained"
    )
    # With this metadata the file alone is enough for a teacher preset of kind open_clip.
    metadata = {"vision_cfg": json.dumps(vision), "embed_dim": str(shape.width), "quick_gelu": "false"}
    return ExportLayout("visual.safetensors", own, metadata, {"open_clip_config.json": config}, "open_clip", usage)


def to_hf(state: Mapping[str, Tensor], shape: Shape) -> ExportLayout:
    """The layout of ``ViTModel`` in transformers."""
    state = folded(state)
    own = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    names = {
        "norm1.": "layernorm_before.",
        "attn.proj.": "attention.output.dense.",
        "norm2.": "layernorm_after.",
        "mlp.fc1.": "intermediate.dense.",
        "mlp.fc2.": "output.dense.",
    }
    own |= {f"encoder.layer.{name}": tensor for name, tensor in _blocks(state, names).items()}
    for number in range(shape.depth):
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{number}.attn.qkv.{kind}"].chunk(3)
            for part, tensor in zip(("query", "key", "value"), parts, strict=True):
                own[f"encoder.layer.{number}.attention.attention.{part}.{kind}"] = tensor
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPS,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }
    preparation = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shape.resize},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": shape.image_size, "width": shape.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(shape.mean),
        "image_std": list(shape.std),
        "do_convert_rgb": True,
    }
    usage = (
        "from transformers import AutoImageProcessor, ViTModel\n\n"
        'prepare = AutoImageProcessor.from_pretrained("FOLDER")\n'
        'encoder = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)\n'
        'tokens = encoder(**prepare(image, return_tensors="pt")).last_hidden_state  # the class token, then the patches'
    )
    files = {"config.json": config, "preprocessor_config.json": preparation}
    return ExportLayout("model.safetensors", own, {"format": "pt"}, files, "transformers", usage)


def _blocks(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The blocks' tensors whose names start with one of ``names``, renamed: ``0.ln_1.weight``."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            number, rest = name.removeprefix("blocks.").split(".", 1)
            for theirs, ours in names.items():
                if rest.startswith(theirs):
                    renamed[f"{number}.{ours}{rest.removeprefix(theirs)}"] = tensor
    return renamed


FORMATS: dict[str, Callable[[Mapping[str, Tensor], Shape], ExportLayout]] = {
    "timm": to_timm,
    "open_clip": to_open_clip,
    "hf": to_hf,
}
"""Layouts by name, as given with ``--format``."""
