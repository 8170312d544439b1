"""Writes the views of a shard: block by block into their stores, then the tars and manifest entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.manifest_targets import StoreUnit
from cae2pipe.artifacts.staging import StagedUnit
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.shard_set import IndexedSample, Shard, ShardSet, index_samples
from cae2pipe.shards.tar import write_samples
from cae2pipe.targets.encoding import EncodedBlock, Meter
from cae2pipe.targets.groups import Cosines, reached, store_facts
from cae2pipe.targets.paths import images_name, images_tar_path, store_name, store_path, view_tar_path
from cae2pipe.targets.records import Records
from cae2pipe.targets.store_layout import PATCHES, StoreLayout
from cae2pipe.targets.store_writing import StoreWriter
from cae2pipe.targets.stored_source import StoredSource


@dataclass
class ViewWriter:
    """One view of one shard while it is written: its store, and what is collected of its blocks until the shard ends.

    ``rendered``: a block's JPEGs (none where views are replayed) and draws, float64 (b, 11). ``cosines``: a block's, by
    group.
    """

    stage: StagedUnit
    store: StoreWriter
    rendered: list[tuple[list[bytes], np.ndarray]] = field(default_factory=list)
    cosines: list[dict[str, Cosines]] = field(default_factory=list)

    @property
    def jpegs(self) -> list[bytes]:
        return [jpeg for jpegs, _ in self.rendered for jpeg in jpegs]

    def append(self, block: EncodedBlock) -> None:
        """Append the next encoded block of this view."""
        rendered = block.rendered
        self.store.append(block.chunks, len(rendered.keys))
        self.rendered.append((rendered.jpegs[block.index], rendered.draws[block.index]))
        self.cosines.append(block.cosines)

    def discard(self) -> None:
        """Close the store, and remove unfinished files."""
        self.store.close()
        self.stage.discard()


@dataclass
class ShardWriter:
    """A shard's views while they are written: what they share, and a writer for each view, by number."""

    shard: Shard
    keys: list[str] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    views: dict[int, ViewWriter] = field(default_factory=dict)

    def append(
        self,
        blocks: Iterable[EncodedBlock],
        root: Path,
        layouts: Sequence[StoreLayout],
        *,
        meter: Meter,
        report: Report,
    ) -> None:
        """Append the shard's encoded blocks to the stores of its views in the set ``root``."""
        for block in blocks:
            view, rendered = block.view, block.rendered
            if view == next(iter(self.views), view):
                self.keys += rendered.keys
                self.labels.append(rendered.labels)
            if view not in self.views:
                stage = StagedUnit(root, store_name(view, self.shard.name))
                store = StoreWriter(stage.path(store_path(view, self.shard.name)), *layouts)
                self.views[view] = ViewWriter(stage, store)
            self.views[view].append(block)
            report.advance(len(rendered.keys), data_wait=meter.idle_fraction())

    def finish(self, artifact: TargetsArtifact, pixels: ShardSet | StoredSource | None, report: Report) -> None:
        """Write the tars of stored views, finish the stores and add the views to the set.

        Args:
            pixels: the images that replayed views are cut from, or a set that stores these views; None where their
                tars have to be written.
        """
        for view, writer in sorted(self.views.items()):
            name = store_name(view, self.shard.name)
            unit = self._finish_view(view, writer, artifact, pixels=pixels)
            if name in artifact.units and artifact.units[name]["files"] != unit["files"]:
                report.log(f"{name} differs from its earlier content: runs that started with it cannot be resumed")
            artifact.add(name, unit)
            writer.stage.discard()

    def _finish_view(
        self, view: int, writer: ViewWriter, artifact: TargetsArtifact, *, pixels: ShardSet | StoredSource | None
    ) -> StoreUnit:
        """Finish the store of one view, and its tar where views are stored; return the manifest's entry."""
        keys, labels, jpegs = self.keys, np.concatenate(self.labels), writer.jpegs
        name, zarr = self.shard.name, store_path(view, self.shard.name)
        kept = isinstance(pixels, ShardSet)
        tar = images_tar_path(name) if kept else view_tar_path(view, name)
        referred = {}
        if isinstance(pixels, StoredSource):
            if artifact.by_reference:
                referred = pixels.referred(view, name)
            else:
                pixels.fetch_tar(view, name, writer.stage)
            records = pixels.records(view, name)
        elif pixels:
            records = self._records(writer, pixels.index(self.shard))
        else:
            write_samples(writer.stage.path(tar), zip(keys, labels.tolist(), jpegs, strict=True))
            index = index_samples(writer.stage.path(tar), [google_crc32c.value(jpeg) for jpeg in jpegs])
            records = self._records(writer, index)
        assert records.keys == keys
        fidelity = reached(writer.cosines)
        writer.store.finish(records, {"view": view, "shard": name, "fidelity": fidelity[PATCHES]})
        held = not (kept or referred)
        files = writer.stage.commit(tar, zarr) if held else writer.stage.commit(zarr)
        images = artifact.units[images_name(name)] if kept else None
        source = images["source"] if images and "shard" in images else self.shard.sha256
        facts = store_facts(writer.store.layouts, zarr, files, fidelity, pixels=sum(map(len, jpegs)) if held else 0)
        unit: StoreUnit = {
            "view": view,
            "shard": name,
            "source": source,
            "samples": len(keys),
            "tar": tar,
            "zarr": zarr,
            "files": files,
            "fidelity": facts["fidelity"],
            "bytes": facts["bytes"],
        }
        if "groups" in facts:
            unit["groups"] = facts["groups"]
        if referred:
            unit["pixels"] = referred
        return unit

    def _records(self, writer: ViewWriter, index: Sequence[IndexedSample]) -> Records:
        """A view's records, given where its samples' pixels are."""
        return Records(
            [sample.key for sample in index],
            np.concatenate(self.labels),
            draws=np.concatenate([draws for _, draws in writer.rendered]),
            members=np.array([(sample.offset, sample.size, sample.crc32c) for sample in index], dtype=np.int64),
        )

    def discard(self) -> None:
        """Discard all views."""
        for writer in self.views.values():
            writer.discard()
