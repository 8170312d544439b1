"""The encoders that the authors of CAE and CAE v2 have released: their names for weights, turned into ours.

Their checkpoints hold the encoder alone, or the whole of pretraining with the encoder under ``encoder.``; either may
lie under ``model``, beside optimizer, scaler and arguments, as their ``utils.save_model`` writes it. The number of
attention heads is not in them: it is that of their published sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cae2pipe.errors import SourceError
from cae2pipe.models.encoder import Encoder

PREFIX = "encoder."
HEADS = {192: 12, 384: 12, 768: 12, 1024: 16}
"""Attention heads by width, as in their scripts."""
RENAMED = (("patch_embed.proj.", "patch_embed."), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
FIX = "give an encoder's .pth as the authors of CAE or CAE v2 released it, or a folder that `cae2pipe pretrain` wrote"


def load_released(state: Mapping[str, Tensor], where: Path) -> Encoder:
    """The encoder of a released checkpoint.

    Args:
        state: its tensors. where: its file, for messages.

    Raises:
        SourceError: weights are missing, left over or of another shape than the others call for.
    """
    if any(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    own = {_renamed(name): tensor.float() for name, tensor in state.items()}
    kernel, positions = own.get("patch_embed.weight"), own.get("pos_embed")
    if kernel is None or positions is None or kernel.ndim != 4 or positions.ndim != 3:
        raise SourceError(
            "this is not an encoder of CAE or CAE v2: it has no patch_embed or pos_embed", where=where, fix=FIX
        )
    width, patch = kernel.shape[0], kernel.shape[-1]
    side = round((positions.shape[1] - 1) ** 0.5)
    numbers = [int(match[1]) for name in own if (match := re.match(r"blocks\.(\d+)\.", name))]
    if width not in HEADS or not numbers or side * side + 1 != positions.shape[1]:
        raise SourceError(
            f"an encoder of width {width} with {len(set(numbers))} blocks and {positions.shape[1]} positions is none "
            f"of the released ones (widths {', '.join(map(str, HEADS))})",
            where=where,
            fix=FIX,
        )
    encoder = Encoder(
        width=width, depth=max(numbers) + 1, heads=HEADS[width], image_size=side * patch, patch_size=patch
    )
    wanted = encoder.state_dict()
    problems = [
        *(f"{name} is missing" for name in wanted if name not in own),
        *(f"{name} is left over" for name in own if name not in wanted),
        *(
            f"{name} is {tuple(own[name].shape)} and not {tuple(wanted[name].shape)}"
            for name in wanted
            if name in own and own[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise SourceError(f"not all weights of this encoder fit: {problems[0]}{more}", where=where, fix=FIX)
    with torch.no_grad():
        encoder.load_state_dict(own)
    return encoder


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name
