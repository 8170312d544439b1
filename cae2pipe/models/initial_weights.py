"""The weights of a vision transformer of timm, as those of a student that continues from it.

The student computes the same function: a bias of k is dropped, since it cancels in the softmax; a branch without
LayerScale gets one of ones; another normalisation of pixels is folded into the patch embedding; positions are resampled
as timm does. Only the epsilon of its norms is the student's: another one is noted. What cannot be carried over is
refused, or noted if training makes up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD
from cae2pipe.models.formats import TABLE
from cae2pipe.models.layers import EPS
from cae2pipe.models.relative_positions import resized_table
from cae2pipe.models.trainable import plain_vit

SIZES = ("width", "depth", "heads", "patch_size")


@dataclass(frozen=True)
class EncoderWeights:
    """``state``: the weights and positions of an ``Encoder`` by name, float32. Those that the model lacks are omitted.
    ``notes``: what of the model the student does without, or computes otherwise, in words."""

    state: dict[str, Tensor]
    notes: list[str]


def encoder_weights(
    model: Any, settings: ModelSettings, *, mean: Sequence[float], std: Sequence[float], where: object
) -> EncoderWeights:
    """The weights of timm's ``model`` for the student that the settings describe.

    Args:
        mean, std: with which the model's pixels in [0, 1] are normalised. where: the model's name, for messages.

    Raises:
        SettingsError: it is not a vision transformer as the student is, or of another shape.
    """
    model, tables, reach = plain_vit(model)
    refuse_other_model(model, where)
    refuse_other_size(model, settings, where)
    if tables and not settings.relative_positions:
        raise SettingsError(
            "these weights have relative positions, the student none",
            where=f"model.init {where}",
            fix="--set model.relative_positions=true",
        )
    if bool(reach) != settings.rotary_positions:
        has = "these weights have rotary positions, the student none"
        raise SettingsError(
            has if reach else "the student has rotary positions, these weights none",
            where=f"model.init {where}",
            fix=f"--set model.rotary_positions={'true' if reach else 'false'}",
        )
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    own = {f"patch_embed.{name}": tensor for name, tensor in patch_embedding(model, mean, std).items()}
    own["pos_embed"] = positions(model, settings.grid)
    if "cls_token" in state:
        own["cls_token"] = state["cls_token"]
    # Models that pool the patches' mean apply their final norm after pooling.
    norm = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
    own |= {f"norm.{name}": state[f"{norm}.{name}"] for name in ("weight", "bias")}
    for number in range(len(model.blocks)):
        own |= block_weights(state, f"blocks.{number}.", settings.width)
        if tables:
            own[f"blocks.{number}.{TABLE}"] = resized_table(tables[number].float(), settings.grid, settings.grid)
    other = [f"its rotary positions span {reach} patches, the student's {settings.grid}, so features differ"]
    return EncoderWeights(own, notes(model) + other * (reach not in (None, settings.grid)))


def refuse_other_model(model: Any, where: object) -> None:
    """Raise SettingsError, which names all differences, unless the student can compute the same function."""
    from timm.models.vision_transformer import VisionTransformer

    differences = []
    if type(model) is not VisionTransformer:
        differences.append(f"it is a {type(model).__name__}, not a plain vision transformer of timm")
    if getattr(model, "rope", None) is not None:
        differences.append("it has rotary positions")
    elif getattr(model, "pos_embed", None) is None:
        differences.append("it has no absolute positions")
    if not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity):
        differences.append("it has a norm before its blocks")
    if not any(type(getattr(model, name, None)) is not nn.Identity for name in ("norm", "fc_norm")):
        differences.append("it has no final norm")
    kinds: dict[str, None] = {}
    for block in getattr(model, "blocks", ()):
        kinds |= dict.fromkeys(block_differences(block))
    if differences or kinds:
        raise SettingsError(
            f"the student cannot continue from this model: {', '.join([*differences, *kinds])}",
            where=f"model.init {where}",
            fix="give a plain ViT, such as timm:vit_small_patch16_224.augreg_in21k or timm:vit_small_patch14_dinov2, "
            "or a run of pretrain",
        )


def block_differences(block: Any) -> list[str]:
    """What a block of timm computes that the student's do not, in words."""
    from timm.layers import Attention, Mlp
    from timm.models.vision_transformer import Block

    if type(block) is not Block:
        return [f"its blocks are of kind {type(block).__name__}"]
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        return [f"its attention is {type(attn).__name__}"]
    found = {
        "its attention normalises q and k": not isinstance(attn.q_norm, nn.Identity),
        "its attention normalises its output": not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity),
        "its attention has gates": getattr(attn, "gate", None) is not None,
        "its norms are not LayerNorm": not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)),
    }
    if type(mlp) is not Mlp:
        found[f"its MLP is {type(mlp).__name__}, the student's has two layers with a GELU"] = True
    else:
        hidden, width = mlp.fc1.weight.shape
        found |= {
            f"its MLP is {hidden / width:g} times as wide, the student's 4 times": hidden != 4 * width,
            f"its activation is {type(mlp.act).__name__}, the student's an exact GELU": not _exact_gelu(mlp.act),
            "its MLP normalises its hidden layer": not isinstance(mlp.norm, nn.Identity),
        }
    return [difference for difference, holds in found.items() if holds]


def _exact_gelu(layer: nn.Module) -> bool:
    from timm.layers import GELU

    return type(layer) in (nn.GELU, GELU) and getattr(layer, "approximate", "none") == "none"


def refuse_other_size(model: Any, settings: ModelSettings, where: object) -> None:
    """Raise SettingsError, which names all differences and the settings that remove them, unless the sizes fit."""
    patch = model.patch_embed.patch_size
    sizes = {
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "heads": model.blocks[0].attn.num_heads,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
    }
    other = {name: size for name, size in sizes.items() if size != getattr(settings, name)}
    if other:
        differences = [f"{name} {size}, the student {getattr(settings, name)}" for name, size in other.items()]
        raise SettingsError(
            f"these weights have {'; '.join(differences)}",
            where=f"model.init {where}",
            fix=" ".join(f"--set model.{name}={size}" for name, size in other.items()),
        )


def patch_embedding(model: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Weight and bias for pixels with the student's normalisation, of a model with another one."""
    proj = model.patch_embed.proj
    weight = proj.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if proj.bias is None else proj.bias.detach().double()
    if (tuple(mean), tuple(std)) != (PIXEL_MEAN, PIXEL_STD):
        theirs, ours = (
            torch.tensor([mean, std], dtype=torch.float64),
            torch.tensor([PIXEL_MEAN, PIXEL_STD], dtype=torch.float64),
        )
        shift = ((ours[0] - theirs[0]) / theirs[1]).view(1, -1, 1, 1)
        bias = bias + (weight * shift).sum(dim=(1, 2, 3))
        weight = weight * (ours[1] / theirs[1]).view(1, -1, 1, 1)
    return {"weight": weight.float(), "bias": bias.float()}


def positions(model: Any, grid: int) -> Tensor:
    """Positions (1, 1 + grid * grid, W), the class token's first: zero if the model has none for it."""
    from timm.layers import resample_abs_pos_embed

    own = model.pos_embed.detach().float()
    prefix = own.shape[1] - model.patch_embed.num_patches
    resampled = resample_abs_pos_embed(
        own, [grid, grid], old_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix
    )
    patches = resampled[:, prefix:]
    first = own[:, :1] if prefix and model.cls_token is not None else torch.zeros_like(own[:, :1])
    return torch.cat([first, patches], dim=1)


def block_weights(state: dict[str, Tensor], block: str, width: int) -> dict[str, Tensor]:
    """A block's weights under the student's names, from a timm model's ``state``."""
    ones, zeros = torch.ones(width), torch.zeros(3 * width)
    own = {}
    for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"):
        weight = own[f"{block}{part}.weight"] = state[f"{block}{part}.weight"]
        own[f"{block}{part}.bias"] = state.get(f"{block}{part}.bias", torch.zeros(len(weight)))
    own[f"{block}attn.qkv.weight"] = state[f"{block}attn.qkv.weight"]
    q, _, v = state.get(f"{block}attn.qkv.bias", zeros).chunk(3)
    own |= {f"{block}attn.q_bias": q, f"{block}attn.v_bias": v}
    return own | {f"{block}{branch}.gamma": state.get(f"{block}{branch}.gamma", ones) for branch in ("ls1", "ls2")}


def notes(model: Any) -> list[str]:
    """What of a model the student does without, or computes otherwise, in words."""
    norms = [*model.blocks.modules(), model.norm, getattr(model, "fc_norm", None)]
    other = sorted({norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)} - {EPS})
    registers = model.num_prefix_tokens - (model.cls_token is not None)
    found = {
        f"its {registers} register tokens are dropped, as the student has none": registers > 0,
        "it has no class token, so the student's is drawn": model.cls_token is None,
        f"the epsilon of its norms is {' or '.join(f'{eps:g}' for eps in other)}, the student's {EPS:g}, so features "
        "differ slightly": bool(other),
    }
    return [note for note, holds in found.items() if holds]
