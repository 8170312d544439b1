"""The views of a shard while they are written: block after block into their stores, then the tars and entries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.box import Box
from cae2pipe.artifacts.staging import Stage
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.shard_set import Shard, ShardSet, index_samples
from cae2pipe.shards.tar import write_samples
from cae2pipe.targets.calibration import summarise
from cae2pipe.targets.encoding import EncodedBlock, Meter
from cae2pipe.targets.paths import images_name, images_tar_path, store_name, store_path, view_tar_path
from cae2pipe.targets.store import Layout, StoreWriter


@dataclass
class _Pair:
    """One (view, shard) pair while it is written."""

    stage: Stage
    writer: StoreWriter
    rendered: list[tuple[list[bytes], np.ndarray]] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)
    centred: list[Tensor] = field(default_factory=list)

    @property
    def jpegs(self) -> list[bytes]:
        return [jpeg for jpegs, _ in self.rendered for jpeg in jpegs]

    def discard(self) -> None:
        self.writer.close()
        self.stage.discard()


@dataclass
class _Shard:
    """A shard's pairs by view, and what they share."""

    shard: Shard
    keys: list[str] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    pairs: dict[int, _Pair] = field(default_factory=dict)


def collect(
    current: _Shard, root: Path, layout: Layout, blocks: Iterable[EncodedBlock], meter: Meter, report: Report
) -> None:
    """Append a shard's encoded blocks to its views' stores, opened in ``current``."""
    for block in blocks:
        view, rendered = block.view, block.rendered
        if view == next(iter(current.pairs), view):
            current.keys += rendered.keys
            current.labels.append(rendered.labels)
        if view not in current.pairs:
            stage = Stage(root, store_name(view, current.shard.name))
            writer = StoreWriter(stage.path(store_path(view, current.shard.name)), layout)
            current.pairs[view] = _Pair(stage, writer)
        pair = current.pairs[view]
        pair.writer.append(block.chunks, len(rendered.keys))
        pair.rendered.append((rendered.jpegs[block.place], rendered.draws[block.place]))
        pair.raw.append(block.raw)
        pair.centred.append(block.centred)
        report.advance(len(rendered.keys), views_per_s=meter.rate(), teacher_waits=meter.waits())


def finish_shard(box: Box, current: _Shard, kept: ShardSet | None, report: Report) -> None:
    """Write the tars of stored views, finish the stores and list the pairs of a shard. ``kept``: the images that
    replayed views are cut from."""
    for view, pair in sorted(current.pairs.items()):
        name = store_name(view, current.shard.name)
        unit = finish_pair(box, current, view, pair, kept)
        if name in box.units and box.units[name]["files"] != unit["files"]:
            report.log(f"{name} does not come out as it was: runs that began with it cannot be resumed")
        box.add(store_name(view, current.shard.name), unit)
        pair.stage.discard()


def finish_pair(box: Box, current: _Shard, view: int, pair: _Pair, kept: ShardSet | None) -> dict[str, Any]:
    """Finish the store of one view of one shard, and its tar where views are stored; return the manifest's entry."""
    keys, labels, jpegs = current.keys, np.concatenate(current.labels), pair.jpegs
    name, zarr = current.shard.name, store_path(view, current.shard.name)
    if kept:
        tar, index = images_tar_path(name), kept.index(current.shard)
    else:
        tar = view_tar_path(view, current.shard.name)
        write_samples(pair.stage.path(tar), zip(keys, labels.tolist(), jpegs, strict=True))
        index = index_samples(pair.stage.path(tar), [google_crc32c.value(jpeg) for jpeg in jpegs])
    assert [sample.key for sample in index] == keys
    members = np.array([(sample.offset, sample.size, sample.crc32c) for sample in index], dtype=np.int64)
    fidelity = asdict(summarise(torch.cat(pair.raw), torch.cat(pair.centred)))
    pair.writer.finish(
        keys,
        labels,
        np.concatenate([draws for _, draws in pair.rendered]),
        members,
        {"codec": pair.writer.layout.codec.name, "view": view, "shard": name, "fidelity": fidelity},
    )
    files = pair.stage.commit(zarr) if kept else pair.stage.commit(tar, zarr)
    source = box.units[images_name(name)]["source"] if kept else current.shard.sha256
    return {
        "view": view,
        "shard": name,
        "source": source,
        "samples": len(keys),
        "tar": tar,
        "zarr": zarr,
        "files": files,
        "fidelity": fidelity,
        "bytes": {
            "latents": pair.writer.layout.latent_bytes(zarr, files),
            "pixels": 0 if kept else sum(map(len, jpegs)),
        },
    }
