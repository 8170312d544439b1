"""Fresh views cut from the originals in every epoch, as published; the cache replaces this."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cae2pipe.artifacts.artifact import is_artifact
from cae2pipe.artifacts.storage import to_path
from cae2pipe.config.extract import ViewSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import ManifestError, MismatchError
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.views import draw_view, render_view
from cae2pipe.runtime.keyed import keyed_seed
from cae2pipe.shards.shard_set import ImageSample, Shard, ShardSet
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.paths import SHARDS_FOLDER
from cae2pipe.targets.shared_pixels import parent_set
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class FreshViews:
    """The originals that a target set was made from, and how views are cut from them.

    ``seed`` is the run's, so no draw repeats one of a stored view.
    """

    originals: ShardSet
    shards: dict[str, Shard]
    settings: ViewSettings
    seed: int

    def read(self, shard: str, block: int) -> list[ImageSample]:
        """The originals of one block, in its order. Raises DamageError where they have changed."""
        own = self.shards[shard]
        return self.originals.read(own, block * BLOCK, min((block + 1) * BLOCK, own.samples))

    def render(self, data: bytes, key: str, epoch: int) -> np.ndarray:
        """The view of an epoch, uint8 (H, W, 3). It is never encoded as a JPEG, as in the published method."""
        image = decode_rgb(data, where=f"{self.originals.root}, key {key}")
        draw = draw_view(
            self.settings, keyed_seed("fresh", self.seed), key, view=epoch, height=image.height, width=image.width
        )
        return np.asarray(render_view(image, draw, self.settings))


def fresh_views(targets: TargetSet, settings: PretrainSettings) -> FreshViews:
    """The originals of a target set. Raises MismatchError if they differ, ManifestError if there are none."""
    inside = parent_set(targets.root) or targets.root
    root = to_path(settings.originals) if settings.originals else inside / SHARDS_FOLDER
    if not is_artifact(root, "shards"):
        raise ManifestError(
            "fresh views need the shard set that the targets were made from", where=root, fix="--set originals=FOLDER"
        )
    originals = ShardSet.open(root)
    shards = {shard.name: shard for shard in originals.shards}
    for name in sorted(targets.stores):
        unit = targets.stores[name]
        shard = shards.get(unit["shard"])
        if shard is None or shard.sha256 != unit["source"]:
            raise MismatchError(
                f"store {name} was not made from this shard set",
                where=root,
                fix="use the shard set that the targets were made from: --set originals=FOLDER",
            )
    return FreshViews(originals, shards, settings=targets.view, seed=settings.seed)
