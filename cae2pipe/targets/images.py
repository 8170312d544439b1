"""The images of a target set whose views are replayed: each kept once, reduced, in one tar per shard, with an index.

A shard's images are a unit of the set, ``images/000123``, written before the first view is cut from them. They are read
like the originals of a shard set.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import google_crc32c

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.manifest_targets import ImagesUnit, listed
from cae2pipe.artifacts.staging import staged
from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import DamageError
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.workers import in_order
from cae2pipe.shards.shard_set import ImageSample, Shard, ShardSet, write_index
from cae2pipe.shards.tar import write_samples
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.paths import images_index_path, images_name, images_tar_path
from cae2pipe.targets.rendering import Reducer
from cae2pipe.targets.store import rebuild_fix


def images_units(artifact: TargetsArtifact) -> dict[str, ImagesUnit]:
    """The manifest's entries of the images that a set's replayed views are cut from, by unit."""
    return {name: unit for name, unit in sorted(artifact.units.items()) if "shard" in unit and "view" not in unit}


def kept_images(artifact: TargetsArtifact, root: Path) -> ShardSet:
    """Those images as a shard set. ``root``: the folder that they lie in."""
    shards = []
    for unit in images_units(artifact).values():
        tar, index = images_tar_path(unit["shard"]), images_index_path(unit["shard"])
        files = listed(unit)
        digests = (files[path]["sha256"] for path in (tar, index))
        shards.append(Shard(unit["shard"], unit["samples"], root / tar, *digests))
    return ShardSet(root, artifact.facts["classes"], shards, rebuild_fix(root))


def make_images(
    artifact: TargetsArtifact,
    originals: ShardSet,
    shards: list[Shard],
    *,
    settings: ViewSettings,
    workers: int,
    report: Report,
) -> None:
    """Reduce the originals of some shards, and keep them.

    Raises:
        DamageError: views were cut from earlier versions of these images, and they cannot be reproduced.
    """
    if not shards:
        return
    report.phase("reducing the images that views are replayed from")
    report.total(sum(shard.samples for shard in shards), "images")
    blocks = [(shard, block) for shard in shards for block in range(-(-shard.samples // BLOCK))]
    reducer = Reducer(originals, blocks, settings)
    reduced = in_order(reducer, min(workers, len(blocks)) if len(blocks) > 1 else 0, preload=[__name__])
    for shard, blocks_of_shard in groupby(reduced, key=lambda item: item[0]):
        samples = []
        for _, block in blocks_of_shard:
            samples += block
            report.advance(len(block))
        keep_images(artifact, shard, samples)


def keep_images(artifact: TargetsArtifact, shard: Shard, samples: list[ImageSample]) -> None:
    """Write the reduced images of a shard, and add them to the manifest."""
    name, tar, index = images_name(shard.name), images_tar_path(shard.name), images_index_path(shard.name)
    with staged(artifact.root, name) as stage:
        write_samples(stage.path(tar), ((sample.key, sample.label, sample.data) for sample in samples))
        write_index(stage.path(index), stage.path(tar), [google_crc32c.value(sample.data) for sample in samples])
        if name in artifact.units and stage.entries(tar, index) != artifact.units[name]["files"]:
            raise DamageError(
                f"the images of shard {shard.name} differ from those that views were cut from",
                where=artifact.root / tar,
                fix="repair the set on the machine that made it, restore the file from a copy, or make the set again",
            )
        files = stage.commit(tar, index)
    artifact.add(
        name,
        {
            "shard": shard.name,
            "source": shard.sha256,
            "samples": len(samples),
            "tar": tar,
            "files": files,
            "bytes": {"pixels": sum(len(sample.data) for sample in samples)},
        },
    )
