"""What a target set still lacks, and whether its disk has room for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.manifest_targets import Wanted
from cae2pipe.artifacts.storage import free_bytes, on_one_disk
from cae2pipe.artifacts.work_share import WHOLE, WorkShare
from cae2pipe.errors import BadInputError, MismatchError
from cae2pipe.runtime.progress import gigabytes
from cae2pipe.shards.shard_set import Shard
from cae2pipe.targets.paths import images_name, store_name
from cae2pipe.targets.stored_source import Source, StoredSource
from cae2pipe.targets.target_set import recorded_view


@dataclass(frozen=True)
class MissingUnits:
    """What a shard lacks: views, by number, and whether the images that replayed views are cut from."""

    shard: Shard
    views: tuple[int, ...]
    images: bool

    @property
    def units(self) -> list[str]:
        images = [images_name(self.shard.name)] if self.images else []
        return images + [store_name(view, self.shard.name) for view in self.views]


def missing_units(
    artifact: TargetsArtifact,
    shards: Source,
    views: int,
    *,
    part: WorkShare = WHOLE,
    remake: Collection[str] | None = None,
) -> list[MissingUnits]:
    """What this part still has to make, shard by shard, or which of its units are in ``remake``.

    Raises:
        MismatchError: a stored view was made from a shard of this name with different content.
    """
    whole = artifact.whole()
    replayed = recorded_view(artifact.identity["settings"]).pixels == "replayed"
    result = []
    for index, shard in enumerate(shards.shards):
        own = [view for view in range(views) if not isinstance(shards, StoredSource) or shards.has(view, shard.name)]
        names = {view: store_name(view, shard.name) for view in own}
        images = images_name(shard.name)
        for name in (*names.values(), images):
            unit = artifact.units.get(name)
            if unit and "shard" in unit and unit["source"] != shard.sha256:
                raise MismatchError(
                    f"shard {shard.name} of the source differs from the one that this target set was made from",
                    where=shard.path,
                    fix="use the original source, or a new output folder",
                )

        def is_missing(name: str) -> bool:
            return name in remake if remake is not None else name not in whole

        lacking = MissingUnits(
            shard, tuple(view for view, name in names.items() if is_missing(name)), replayed and is_missing(images)
        )
        if lacking.units and part.owns(index):
            result.append(lacking)
    return result


def wanted(artifact: TargetsArtifact, shards: Source, views: int) -> Wanted:
    """What the complete set will hold, to show how complete it is."""
    before = artifact.facts.get("wanted")
    most = max(views, before["views"] if before else 0)
    if isinstance(shards, StoredSource):
        return shards.planned(most)
    return {"views": most, "shards": len(shards.shards), "images": shards.images}


TAR_OVERHEAD = 2048
"""Minimum bytes per sample that a tar adds to the JPEG: two headers, the label, padding."""


def check_space(artifact: TargetsArtifact, shards: Source, missing: list[MissingUnits]) -> None:
    """Refuse to start what the disk has no room for. Pixels take none where they are hard links, or lie elsewhere.

    Raises:
        BadInputError: the disk is too small; the message names required and free space.
    """
    free = free_bytes(artifact.root)
    expected = artifact.facts["codec"]["expected_bytes"]
    replayed = recorded_view(artifact.identity["settings"]).pixels == "replayed"
    shared = isinstance(shards, StoredSource) and (artifact.by_reference or on_one_disk(shards.pixels, artifact.root))
    pixels = 0 if shared else expected["pixels"] + TAR_OVERHEAD
    needed = sum(
        lacking.shard.samples
        * (len(lacking.views) * expected["latents"] + (lacking.images if replayed else len(lacking.views)) * pixels)
        for lacking in missing
    )
    if free is not None and needed > free:
        raise BadInputError(
            f"the missing views need about {gigabytes(needed)}, and {gigabytes(free)} are free",
            where=artifact.root,
            fix="free some space, use fewer --views or a lower --fidelity, or use a folder on another disk",
        )
