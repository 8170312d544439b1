"""A target set as the source of an extraction: another teacher sees the views that the set stores.

Stored views are decoded, replayed ones are cut again from the images that the set keeps, so a second set differs from
one made from the originals in nothing. Pixels are the same files: hard links where both sets are on one disk. A set by
reference lists them, and does not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.copying import copy_unit
from cae2pipe.artifacts.manifest_targets import ImagesUnit, StoreUnit, Wanted, listed
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.staging import StagedUnit
from cae2pipe.artifacts.storage import fetch_file
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import DamageError, ImageError, MismatchError, SettingsError, command
from cae2pipe.images.jpeg import decode_into
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.shard_set import Shard, ShardSet
from cae2pipe.targets.images import kept_images
from cae2pipe.targets.paths import images_name, of_store, store_name
from cae2pipe.targets.records import Records
from cae2pipe.targets.rendering import RenderedBlock, Renderer, Task
from cae2pipe.targets.store import StoreReader
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True, repr=False)
class StoredSource:
    """The shards whose views ``targets`` has, with the digests of the originals that they were made from."""

    targets: TargetSet
    shards: list[Shard]

    @classmethod
    def of(cls, targets: TargetSet) -> StoredSource:
        units = {of_store(name).shard: targets.stores[name] for name in sorted(targets.stores)}
        root = targets.pixels_root
        kept = kept_images(targets.artifact, root).shards if targets.replayed else []
        indices = {shard.name: shard.index_sha256 for shard in kept}
        shards = [
            Shard(name, unit["samples"], root / unit["tar"], unit["source"], indices.get(name, ""))
            for name, unit in sorted(units.items())
        ]
        return cls(targets, shards)

    @property
    def root(self) -> Path:
        return self.targets.root

    @property
    def pixels(self) -> Path:
        """The folder that its pixels lie in."""
        return self.targets.pixels_root

    @property
    def classes(self) -> list[str]:
        return self.targets.classes

    @property
    def licence(self) -> str | None:
        return self.targets.artifact.facts.get("licences", {}).get("data")

    @property
    def images(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def has(self, view: int, shard: str) -> bool:
        """Whether the set has this view of this shard."""
        return store_name(view, shard) in self.targets.stores

    def planned(self, views: int) -> Wanted:
        """What the complete set will hold, of ``views`` views."""
        # Sets of early versions do not record this.
        own = self.targets.artifact.facts.get("wanted", {"shards": 0, "images": 0})
        shards, images = max(own["shards"], len(self.shards)), max(own["images"], self.images)
        return {"views": views, "shards": shards, "images": images}

    def complete(self, views: int) -> bool:
        """Whether the set has ``views`` views of all shards that it is to have."""
        there = all(self.has(view, shard.name) for view in range(views) for shard in self.shards)
        return there and self.planned(views)["shards"] == len(self.shards)

    def renderer(self, tasks: Sequence[Task], settings: ExtractSettings) -> Renderer | StoredRenderer:
        """Gives the blocks of ``tasks`` as rendering the originals would."""
        if self.targets.replayed:
            return Renderer(self._kept(), tasks, settings.view, seed=settings.seed, kept=True)
        names = {store_name(view, task.shard.name) for task in tasks for view in task.views}
        units = {name: self.targets.stores[name] for name in names}
        layout, size = self.targets.layout, settings.view.size
        return StoredRenderer(self.root, units, layout, tasks, size=size, pixels=self.pixels)

    def _kept(self) -> ShardSet:
        return kept_images(self.targets.artifact, self.pixels)

    def records(self, view: int, shard: str) -> Records:
        """What a store says of its samples. Raises DamageError."""
        return self.targets.reader(store_name(view, shard)).records()

    def fetch_tar(self, view: int, shard: str, stage: StagedUnit) -> None:
        """Put the tar of a stored view into a unit that is being written.

        Raises:
            DamageError: it is missing, or has changed.
        """
        unit = self.targets.stores[store_name(view, shard)]
        tar = unit["tar"]
        path, fix = self.pixels / tar, command("verify", self.pixels, "--repair")
        try:
            fetch_file(path, stage.path(tar))
        except FileNotFoundError:
            raise DamageError("the source's tar is missing", where=path, fix=fix) from None
        if stage.entries(tar)[tar] != listed(unit)[tar]:
            raise DamageError("the source's tar is damaged", where=path, fix=fix)

    def referred(self, view: int, shard: str) -> dict[str, FileEntry]:
        """The entry of the tar of a stored view, for a set by reference."""
        unit = self.targets.stores[store_name(view, shard)]
        return {unit["tar"]: listed(unit)[unit["tar"]]}

    def fetch_images(self, artifact: TargetsArtifact, shards: Sequence[Shard], report: Report) -> None:
        """Give a set the images of some shards that replayed views are cut from.

        Raises:
            DamageError: a file of the source is missing or has changed. MismatchError: the set had other images.
        """
        if not shards:
            return
        names = [images_name(shard.name) for shard in shards]
        source = self.targets.artifact
        for name in names:
            if name in artifact.units and listed(artifact.units[name]) != listed(source.units[name]):
                raise MismatchError(
                    f"{name} of the source differs from the images that this set's views were cut from",
                    where=artifact.root,
                    fix="use the source of before, or a new output folder",
                )
        report.phase("taking over the images that views are replayed from")
        report.total(len(names), "shards")
        kept = self._kept() if source.by_reference else None
        shards_of = {shard.name: shard for shard in kept.shards} if kept else {}
        for shard, name in zip(shards, names, strict=True):
            unit = source.units[name]
            assert "shard" in unit
            assert "view" not in unit
            if artifact.by_reference:
                artifact.add(name, referring(unit))
            else:
                whole: ImagesUnit = {**unit, "files": listed(unit)}
                if kept:
                    index = kept.index(shards_of[shard.name])
                    whole["bytes"] = {"pixels": sum(sample.size for sample in index)}
                    whole.pop("pixels")
                fix = command("verify", self.pixels, "--repair")
                copy_unit(artifact, self.pixels, name, unit=whole, fix=fix)
            report.advance()


def referring(unit: ImagesUnit) -> ImagesUnit:
    """The entry of a shard's images in a set by reference."""
    return {**unit, "files": {}, "pixels": listed(unit), "bytes": {"pixels": 0}}


Source = ShardSet | StoredSource
"""Where an extraction takes images from: originals, or a set that stores views of them."""


def renderer_of(source: Source, tasks: Sequence[Task], settings: ExtractSettings) -> Renderer | StoredRenderer:
    """What renders the blocks of ``tasks``."""
    if isinstance(source, StoredSource):
        return source.renderer(tasks, settings)
    return Renderer(source, tasks, settings.view, seed=settings.seed)


class StoredRenderer:
    """Reads task by task the views that a set stores; picklable for worker processes.

    Args:
        root: the set's folder. units: the manifest's entries of the stores that the tasks name. layout: of its patches.
        size: side of the views in pixels. pixels: the folder that these lie in.
    """

    def __init__(
        self,
        root: Path,
        units: Mapping[str, StoreUnit],
        layout: StoreLayout,
        tasks: Sequence[Task],
        *,
        size: int,
        pixels: Path,
    ):
        self.root = root
        # Loaders of remote files need the entries of those that are read; the rest would only fill messages.
        self.units = {name: {**unit, "files": _read_of(unit)} for name, unit in units.items()}
        self.layout = layout
        self.tasks = tasks
        self.size = size
        self.pixels = pixels
        self._readers: dict[str, StoreReader] = {}

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> RenderedBlock:
        task = self.tasks[index]
        jpegs, pixels, draws = [], [], []
        for view in task.views:
            block = self._reader(store_name(view, task.shard.name)).block(task.block, [])
            decoded = np.empty((len(block.jpegs), self.size, self.size, 3), dtype=np.uint8)
            for jpeg, key, out in zip(block.jpegs, block.keys, decoded, strict=True):
                try:
                    decode_into(jpeg, out)
                except ImageError as error:
                    where = f"{self.root}, {store_name(view, task.shard.name)}, key {key}"
                    raise ImageError(error.what, where=where, fix=error.fix) from None
            jpegs.append(block.jpegs)
            pixels.append(torch.from_numpy(decoded).permute(0, 3, 1, 2))
            draws.append(block.draws)
        return RenderedBlock(task, block.keys, block.labels, jpegs, pixels, draws)

    def _reader(self, name: str) -> StoreReader:
        if name not in self._readers:
            if len(self._readers) >= 64:
                self._readers.clear()
            unit: Any = self.units[name]
            self._readers[name] = StoreReader(self.root, unit, self.layout, pixels=self.pixels)
        return self._readers[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


def _read_of(unit: StoreUnit) -> dict[str, FileEntry]:
    """The entries of the files with a view's pixels and records."""
    return {path: entry for path, entry in listed(unit).items() if path == unit["tar"] or "/samples/" in path}


def as_source(settings: ExtractSettings, targets: TargetSet) -> ExtractSettings:
    """The settings of an extraction from a target set: views as that set has them, all of them unless fewer are given.

    Raises:
        MismatchError: a setting that was given contradicts the set. SettingsError: more views than the set has.
    """
    recorded: Mapping[str, Any] = targets.artifact.identity["settings"]
    seed = int(recorded.get("seed", 0))
    given = {f"view.{name}": getattr(settings.view, name) for name in settings.view.model_fields_set}
    there = {f"view.{name}": getattr(targets.view, name) for name in settings.view.model_fields_set}
    if "seed" in settings.model_fields_set:
        given["seed"], there["seed"] = settings.seed, seed
    for name, value in given.items():
        if value != there[name]:
            raise MismatchError(
                f"{name} is {value!r}, and the views of the source were made with {there[name]!r}",
                where=targets.root,
                fix=f"omit it, or --set {name}={there[name]}, or use the originals as the source",
            )
    views = settings.views if "views" in settings.model_fields_set else targets.views
    if views > targets.views:
        raise SettingsError(
            f"--views {views}, and the source has {targets.views} views of each image",
            where=targets.root,
            fix=f"give --views {targets.views} or fewer, or first add views to the source",
        )
    return settings.model_copy(update={"view": targets.view, "seed": seed, "views": views})
