"""Stored views of one image, read from the target set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cae2pipe.images.views import ViewDraw
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class StoredImage:
    """An image with its views: the tile (H, W, 3); per view the pixels (S, S, 3), the crop box (left, top, right,
    bottom) in pixels of the tile, whether it was flipped, and the teacher's unit latents (P, D)."""

    key: str
    tile: np.ndarray
    views: list[np.ndarray]
    boxes: list[tuple[int, int, int, int]]
    flipped: list[bool]
    latents: list[np.ndarray]


def box_in_image(draw: ViewDraw) -> tuple[int, int, int, int]:
    """A draw's crop box as (left, top, right, bottom) in the unflipped image; draws refer to the flipped one."""
    left = draw.source_width - draw.left - draw.width if draw.flip else draw.left
    return (left, draw.top, left + draw.width, draw.top + draw.height)


def read_stored(targets: TargetSet, images: Path, key: str) -> StoredImage:
    """All stored views of the tile with this key. ``images`` is the folder that the set was made from."""
    with Image.open(images / (key.replace("+", "/") + ".jpg")) as file:
        stored = StoredImage(key, np.asarray(file.convert("RGB")), [], [], [], [])
    for name in sorted(targets.stores):
        reader = targets.reader(name)
        keys = reader.keys()
        if key not in keys:
            continue
        block, index = divmod(keys.index(key), BLOCK)
        draw = ViewDraw.from_row(reader.draws()[keys.index(key)])
        arrays = as_tensors(reader.arrays(block, list(targets.layout.codec.arrays())))
        with torch.no_grad():
            tokens = F.normalize(targets.layout.codec.decode(arrays)[index], dim=-1)
        stored.views.append(targets.pixels(reader.block(block, ()), [index])[0])
        # Draws of replayed views refer to the reduced image.
        scale = stored.tile.shape[1] / draw.source_width
        left, top, right, bottom = (round(edge * scale) for edge in box_in_image(draw))
        stored.boxes.append((left, top, right, bottom))
        stored.flipped.append(draw.flip)
        stored.latents.append(tokens[targets.teacher.class_token :].numpy())
    return stored
