"""Prepares timm's vision transformer for training on labels: the changes made by BEiT, CAE and related methods.

All changes are in place and preserve the function of the network, except for the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cae2pipe.errors import SettingsError
from cae2pipe.models.formats import TABLE
from cae2pipe.models.positions import sincos_positions
from cae2pipe.models.relative_positions import relative_bias, relative_index, resized_table
from cae2pipe.models.rotary_positions import rotations
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


class Plain(NamedTuple):
    """A plain vision transformer of timm, and what it was trained with besides."""

    model: Any
    tables: list[Tensor] | None = None
    """The blocks' biases by relative position."""
    reach: int | None = None
    """Rows and columns of the grid that its rotary positions are scaled to."""


def plain_vit(model: Any) -> Plain:
    """A BEiT or EVA of timm as encoders with relative or rotary positions are exported, as timm's plain vision
    transformer; any other model as it is."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import vit_base_patch16_224

    reach = rotary_reach(model)
    state = model.state_dict() if type(model) is Beit or reach else {}
    related = f"blocks.0.{TABLE}" in state
    if not (related or reach) or "pos_embed" not in state or isinstance(model.norm, nn.Identity):
        return Plain(model)
    numbers = range(len(model.blocks))
    tables = [state.pop(f"blocks.{number}.{TABLE}") for number in numbers] if related else None
    plain = vit_base_patch16_224(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        init_values=1e-5,
        num_classes=0,
    )
    for number in numbers:
        attn = f"blocks.{number}.attn."
        if (q := state.pop(f"{attn}q_bias", None)) is not None:
            state[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q), state.pop(f"{attn}v_bias")])
    for theirs, ours in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    if shapes(state) != shapes(plain.state_dict()):
        return Plain(model)
    plain.load_state_dict(state)
    plain.pretrained_cfg = model.pretrained_cfg
    return Plain(plain.to(model.cls_token.device), tables, reach)


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor."""
    return {name: tensor.shape for name, tensor in state.items()}


def rotary_reach(model: Any) -> int | None:
    """Rows and columns of the grid that rotary positions of a timm model are scaled to; None if it has none, or others
    than ours."""
    from timm.models.eva import Eva

    rope: Any = model.rope if type(model) is Eva else None
    reach = getattr(rope, "ref_feat_shape", None)
    if not reach or reach[0] != reach[1]:
        return None
    head, (rows, cols) = model.embed_dim // model.blocks[0].attn.num_heads, model.patch_embed.grid_size
    own = _for_timm(rotations(rows, cols, head, reach=reach[0], class_token=False))
    theirs = rope.get_embed([rows, cols]).cpu()
    return int(reach[0]) if theirs.shape == own.shape and torch.allclose(theirs, own, atol=1e-5) else None


def _for_timm(turns: Tensor) -> Tensor:
    """``rotations`` as timm takes them: sines, then cosines, (N, 2 D)."""
    return torch.cat([turns[1], turns[0]], dim=1)


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


def add_rotary_positions(model: Any, reach: int) -> None:
    """Have each block turn queries and keys of patches by their ``rotations``. Before ``add_relative_positions``.

    Args:
        reach: rows and columns of the grid that positions are scaled to: that of pretraining.
    """
    from timm.layers import AttentionRope

    rows, cols = model.patch_embed.grid_size
    for block in model.blocks:
        plain = block.attn
        attn: Any = AttentionRope(model.embed_dim, plain.num_heads, num_prefix_tokens=model.num_prefix_tokens)
        attn.qkv, attn.proj = plain.qkv, plain.proj
        attn.rotary_reach = reach
        turns = rotations(rows, cols, attn.head_dim, reach=reach, class_token=False)
        attn.register_buffer("turns", _for_timm(turns).to(plain.proj.weight.device), persistent=False)
        attn.register_forward_pre_hook(_with_turns, with_kwargs=True)
        block.attn = attn


def _with_turns(attention: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**options, "rope": attention.turns}


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
    for each, and so are rotary ones. Tables of relative positions grow once, to the largest grid; smaller ones use the
    middle of them."""
    from timm.layers.format import Format

    model.dynamic_img_size = True
    model.patch_embed.strict_img_size = False
    model.patch_embed.dynamic_img_pad = True
    # Tokens keep the grid shape until positions are added.
    model.patch_embed.flatten = False
    model.patch_embed.output_fmt = Format.NHWC
    attentions = [block.attn for block in model.blocks]
    related = [attn.relative_positions for attn in attentions if hasattr(attn, "relative_positions")]
    rotary = [attn for attn in attentions if hasattr(attn, "turns")]
    reach = max(*model.patch_embed.grid_size, -(-largest // model.patch_embed.patch_size[0]))
    # From here on these depend on the input; as buffers they would be sent between processes.
    for each in related:
        each.relative_position_bias_table = nn.Parameter(resized_table(each.relative_position_bias_table, reach, reach))
        del each.relative_position_index
    for attn in rotary:
        del attn.turns

    def choose(module: Any, inputs: Any, patches: Tensor) -> None:
        rows, cols = patches.shape[1:3]
        if related:
            index = relative_index(rows, cols, reach=reach, class_token=True).to(patches.device)
            for each in related:
                each.relative_position_index = index
        if rotary:
            turns = rotations(rows, cols, rotary[0].head_dim, reach=rotary[0].rotary_reach, class_token=False)
            for attn in rotary:
                attn.turns = _for_timm(turns).to(patches.device)

    if related or rotary:
        model.patch_embed.register_forward_hook(choose)
