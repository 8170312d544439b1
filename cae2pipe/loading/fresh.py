"""Views cut anew from the originals in every epoch, as published: what the cache stands in for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cae2pipe.config.extract import ViewSettings
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.views import draw_view, render_view
from cae2pipe.runtime.keyed import keyed_seed
from cae2pipe.shards.shard_set import ImageSample, Shard, ShardSet
from cae2pipe.targets.chunks import BLOCK


@dataclass(frozen=True)
class FreshViews:
    """The originals that a target set was made from, and how views are cut from them.

    ``seed`` is the run's: no draw repeats one of the stored views.
    """

    originals: ShardSet
    shards: dict[str, Shard]
    settings: ViewSettings
    seed: int

    def read(self, shard: str, block: int) -> list[ImageSample]:
        """The originals of one block, in its order. Raises DamageError where they have changed."""
        found = self.shards[shard]
        return self.originals.read(found, block * BLOCK, min((block + 1) * BLOCK, found.samples))

    def render(self, data: bytes, key: str, epoch: int) -> np.ndarray:
        """The view of an epoch, uint8 (H, W, 3). It never becomes a JPEG, as none did when this was published."""
        image = decode_rgb(data, where=f"{self.originals.root}, key {key}")
        draw = draw_view(self.settings, keyed_seed("fresh", self.seed), key, epoch, image.height, image.width)
        return np.asarray(render_view(image, draw, self.settings))
