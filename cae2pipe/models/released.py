"""The encoders released by the authors of CAE and CAE v2: their weights' names, converted to ours.

Their checkpoints contain the encoder only, or the whole pretraining model with the encoder under ``encoder.``. Either
may be under ``model``, next to optimizer, scaler and arguments, as their ``utils.save_model`` writes it. The number of
attention heads is not stored; it follows from the published sizes.
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
"""Number of attention heads by width, from their scripts."""
RENAMED = (("patch_embed.proj.", "patch_embed."), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
FIX = "use a .pth of an encoder released by the authors of CAE or CAE v2, or a folder written by `cae2pipe pretrain`"


def load_released(state: Mapping[str, Tensor], where: Path) -> Encoder:
    """The encoder of a released checkpoint.

    Args:
        state: its tensors. where: its file, for messages.

    Raises:
        SourceError: weights are missing, unexpected or of the wrong shape.
    """
    if any(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    own = {_renamed(name): tensor.float() for name, tensor in state.items()}
    kernel, positions = own.get("patch_embed.weight"), own.get("pos_embed")
    if kernel is None or positions is None or kernel.ndim != 4 or positions.ndim != 3:
        raise SourceError(
            "this is not a CAE or CAE v2 encoder: it has no patch_embed or pos_embed", where=where, fix=FIX
        )
    width, patch = kernel.shape[0], kernel.shape[-1]
    side = round((positions.shape[1] - 1) ** 0.5)
    numbers = [int(match[1]) for name in own if (match := re.match(r"blocks\.(\d+)\.", name))]
    if width not in HEADS or not numbers or side * side + 1 != positions.shape[1]:
        raise SourceError(
            f"an encoder of width {width} with {len(set(numbers))} blocks and {positions.shape[1]} positions is not "
            f"one of the released ones (widths {', '.join(map(str, HEADS))})",
            where=where,
            fix=FIX,
        )
    encoder = Encoder(
        width=width, depth=max(numbers) + 1, heads=HEADS[width], image_size=side * patch, patch_size=patch
    )
    wanted = encoder.state_dict()
    problems = [
        *(f"{name} is missing" for name in wanted if name not in own),
        *(f"{name} is unexpected" for name in own if name not in wanted),
        *(
            f"{name} has shape {tuple(own[name].shape)}, expected {tuple(wanted[name].shape)}"
            for name in wanted
            if name in own and own[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise SourceError(f"the weights of this encoder do not fit: {problems[0]}{more}", where=where, fix=FIX)
    with torch.no_grad():
        encoder.load_state_dict(own)
    return encoder


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name
