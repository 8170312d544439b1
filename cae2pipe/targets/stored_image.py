"""Stored views of one image of a target set, with their crop boxes and latents."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from cae2pipe.images.jpeg import open_jpeg
from cae2pipe.images.views import ViewDraw
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.target_set import TargetSet

CropBox = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class StoredView:
    """One view: its number, pixels uint8 (S, S, 3), the crop box in the unflipped image, whether it was flipped, and
    the unit latents of its patches as stored, float32 (P, D)."""

    number: int
    pixels: np.ndarray
    box: CropBox
    flipped: bool
    latents: np.ndarray


@dataclass(frozen=True)
class StoredImage:
    """An image of a set and some of its views, at least one.

    ``height`` and ``width``: of the image to which crop boxes refer. ``picture``, uint8 (H, W, 3): that image at any
    size, or None if the set does not keep it.
    """

    key: str
    height: int
    width: int
    picture: np.ndarray | None
    views: list[StoredView]


def crop_box(draw: ViewDraw) -> CropBox:
    """A draw's crop box in the unflipped image; draws refer to the flipped one."""
    left = draw.source_width - draw.left - draw.width if draw.flip else draw.left
    return (left, draw.top, left + draw.width, draw.top + draw.height)


def find_image(targets: TargetSet, key: str) -> tuple[str, int]:
    """The shard of the image with this key, and its position in it.

    Raises:
        KeyError: no image has this key.
    """
    for unit in {unit["shard"]: unit for unit in targets.stores.values()}.values():
        keys = targets.reader(f"v{unit['view']:02d}/{unit['shard']}").records().keys
        if key in keys:
            return unit["shard"], keys.index(key)
    raise KeyError(key)


def read_stored_image(
    targets: TargetSet, shard: str, position: int, views: Collection[int] | None = None
) -> StoredImage:
    """An image by its shard and its position in it, with its stored views (default: all; else those of ``views``).

    Raises:
        DamageError: a view or its latents cannot be read. ImageError: a view cannot be decoded.
    """
    block, within = divmod(position, BLOCK)
    stored: list[StoredView] = []
    picture = None
    for name, unit in sorted(targets.stores.items(), key=lambda item: int(item[1]["view"])):
        if unit["shard"] != shard or (views is not None and unit["view"] not in views):
            continue
        contents = targets.reader(name).block(block, list(targets.layout.codec.arrays()))
        draw = ViewDraw.from_row(contents.draws[within])
        # The whole block is decoded, as loaders do.
        tokens = targets.layout.codec.decode(as_tensors(contents.arrays))[within]
        latents = F.normalize(tokens[targets.teacher.class_token :], dim=-1)
        pixels = targets.pixels(contents, [within])[0]
        if picture is None and targets.replayed is not None:
            picture = np.asarray(open_jpeg(contents.jpegs[within]))
        stored.append(StoredView(unit["view"], pixels, crop_box(draw), draw.flip, latents.numpy()))
        key, height, width = contents.keys[within], draw.source_height, draw.source_width
    return StoredImage(key, height, width, picture, stored)
