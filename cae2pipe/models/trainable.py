"""Prepares timm's vision transformer for training on labels: the changes made by BEiT, CAE and related methods.

All changes are in place and preserve the function of the network, except for the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.errors import SettingsError
from cae2pipe.models.formats import TABLE
from cae2pipe.models.positions import sincos_positions
from cae2pipe.models.relative_positions import relative_bias, relative_index, resized_table
from cae2pipe.models.truncated_normal import truncated_normal


def check_trainable(model: Any, where: object) -> None:
    """Refuse anything but a plain vision transformer of timm. Raises SettingsError."""
    from timm.models.vision_transformer import Block, VisionTransformer

    blocks = getattr(model, "blocks", ())
    if isinstance(model, VisionTransformer) and len(blocks) and all(type(block) is Block for block in blocks):
        return
    raise SettingsError(
        f"{type(model).__name__} cannot be fine-tuned: only timm's plain vision transformers can",
        where=where,
        fix="use a run, an exported or released encoder, or timm:NAME of a vit_ or deit_ model; OpenAI's CLIP is "
        "timm:vit_base_patch16_clip_quickgelu_224.openai",
    )


def plain_vit(model: Any) -> tuple[Any, list[Tensor] | None]:
    """A BEiT of timm with fixed or learnt positions besides its relative ones, as encoders with relative positions are
    exported, as timm's plain vision transformer, and the blocks' tables; any other model as it is, and None."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import vit_base_patch16_224

    state = model.state_dict() if type(model) is Beit else {}
    if f"blocks.0.{TABLE}" not in state or "pos_embed" not in state or isinstance(model.norm, nn.Identity):
        return model, None
    tables = [state.pop(f"blocks.{number}.{TABLE}") for number in range(len(model.blocks))]
    for number in range(len(model.blocks)):
        attn = f"blocks.{number}.attn."
        q, v = (state.pop(f"{attn}{name}_bias") for name in ("q", "v"))
        state[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    plain = vit_base_patch16_224(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        init_values=1e-5,
        num_classes=0,
    )
    scales = (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    for theirs, ours in scales:
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    plain.load_state_dict(state)
    plain.pretrained_cfg = model.pretrained_cfg
    return plain.to(model.cls_token.device), tables


def resize_input(model: Any, size: int) -> None:
    """Set the input size and resample positions. Raises SettingsError unless it is a multiple of the patch size."""
    patch = model.patch_embed.patch_size[0]
    if size % patch:
        raise SettingsError(
            f"image_size {size} is not a multiple of the encoder's patch size, {patch}",
            where="image_size",
            fix=f"--set image_size={max(1, round(size / patch)) * patch}",
        )
    if tuple(model.patch_embed.img_size) != (size, size):
        model.set_input_size(img_size=(size, size))


@torch.no_grad()
def freeze_fixed_positions(model: Any) -> None:
    """Freeze sin-cos positions; learned positions stay trainable."""
    rows, cols = model.patch_embed.grid_size
    own = model.pos_embed
    if own is None or own.shape[-1] % 4:
        return
    table = sincos_positions(rows, cols, own.shape[-1]).to(own)
    if torch.allclose(own[0, -rows * cols :], table, atol=1e-4):
        own.requires_grad_(False)


@torch.no_grad()
def unfold_layer_scale(model: Any, initial: float) -> None:
    """Give each branch without LayerScale one of ``initial``, and divide the preceding weights by it.

    In pretraining these weights were followed by a LayerScale, which older versions multiplied into them on export.
    Without this, the same learning rate would change them by that much more.
    """
    from timm.layers import LayerScale

    for block in model.blocks:
        for name, linear in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            if not isinstance(getattr(block, name), nn.Identity):
                continue
            scale = LayerScale(linear.out_features, init_values=initial).to(linear.weight.device)
            setattr(block, name, scale)
            linear.weight.div_(initial)
            linear.bias.div_(initial)


def add_relative_positions(model: Any, where: object, tables: Sequence[Tensor] | None = None) -> None:
    """Give each block a table of biases by relative position, which is added to its attention scores and starts at zero
    (released code), or as one of ``tables``, of the same or of another grid (resampled as in BEiT). Raises
    SettingsError for models with more than a class token before the patches."""
    from timm.layers import RelPosBias

    if model.num_prefix_tokens > 1:
        raise SettingsError(
            f"relative positions allow at most one token before the patches; this model has {model.num_prefix_tokens}",
            where=where,
            fix="--set relative_positions=false",
        )
    grid = model.patch_embed.grid_size
    for number, block in enumerate(model.blocks):
        bias = RelPosBias(grid, block.attn.num_heads, model.num_prefix_tokens)
        nn.init.zeros_(bias.relative_position_bias_table)
        if tables is not None:
            bias.relative_position_bias_table = nn.Parameter(resized_table(tables[number], *grid))
        block.attn.relative_positions = bias.to(block.attn.proj.weight.device)
        block.attn.register_forward_pre_hook(_with_bias, with_kwargs=True)


def _with_bias(attention: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = attention.relative_positions
    index = positions.relative_position_index
    tokens = math.isqrt(index.numel())
    bias = relative_bias(positions.relative_position_bias_table, index.view(tokens, tokens))
    return args, {**options, "attn_mask": bias}


def set_drop_path(model: Any, largest: float) -> None:
    """Set drop path in every block, with a rate that rises linearly from 0 over the depth."""
    from timm.layers import DropPath

    depth = len(model.blocks)
    for number, block in enumerate(model.blocks):
        rate = largest * number / max(1, depth - 1)
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))


def set_classifier(model: Any, classes: int, scale: float) -> None:
    """Set a classifier on the mean patch token. The encoder's final norm comes after the mean, as ``fc_norm``.

    Weights are drawn with a standard deviation of 0.02 and multiplied by ``scale``.
    """
    if isinstance(model.fc_norm, nn.Identity):
        model.fc_norm, model.norm = model.norm, nn.Identity()
    model.attn_pool = None
    model.global_pool = "avg"
    model.num_classes = classes
    device = model.patch_embed.proj.weight.device
    model.head = nn.Linear(model.embed_dim, classes).to(device)
    truncated_normal(model.head.weight, std=0.02, cut=2)
    nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        model.head.weight.mul_(scale)


def layer_decay_groups(model: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a plain timm model, each with ``lr_scale``: layer_decay^(L + 1 - i), where i is 0 for the
    embeddings, 1 to L for the blocks, L + 1 for what follows. One-dimensional parameters, class token and positions
    have no weight decay."""
    from timm.optim import param_groups_layer_decay

    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    return groups


def take_any_size(model: Any, largest: int = 1333) -> None:
    """Accept images of any size up to ``largest`` pixels, padded to whole patches; positions are resampled bicubically
    for each. Tables of relative positions grow once, to the largest grid; smaller ones use the middle of them."""
    from timm.layers.format import Format

    model.dynamic_img_size = True
    model.patch_embed.strict_img_size = False
    model.patch_embed.dynamic_img_pad = True
    # Tokens keep the grid shape until positions are added.
    model.patch_embed.flatten = False
    model.patch_embed.output_fmt = Format.NHWC
    positions = [block.attn.relative_positions for block in model.blocks if hasattr(block.attn, "relative_positions")]
    if not positions:
        return
    reach = max(*model.patch_embed.grid_size, -(-largest // model.patch_embed.patch_size[0]))
    for each in positions:
        each.relative_position_bias_table = nn.Parameter(resized_table(each.relative_position_bias_table, reach, reach))
        # From here on it depends on the input; as a buffer it would be sent between processes.
        del each.relative_position_index

    def choose(module: Any, inputs: Any, patches: Tensor) -> None:
        rows, cols = patches.shape[1:3]
        index = relative_index(rows, cols, reach=reach, class_token=True).to(patches.device)
        for each in positions:
            each.relative_position_index = index

    model.patch_embed.register_forward_hook(choose)
