"""Stage 1: images to views and the teacher's latents.

Read from top to bottom: take this process's part, open the source, load the teacher, calibrate the codec once, then
shard by shard render the views that are missing, run the teacher on what loaders of the set will see, encode and write.
A finished (view, shard) pair is never made again; everything else is made so that the same inputs give the same bytes,
however the work is split.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.box import MANIFEST, TargetsBox, is_box, refuse_foreign
from cae2pipe.artifacts.lock import can_lock, holding, writing
from cae2pipe.artifacts.manifest_targets import Store, Wanted
from cae2pipe.artifacts.manifest_values import Teacher as TeacherEntry
from cae2pipe.artifacts.parts import WHOLE, Part
from cae2pipe.artifacts.places import file_size, free_bytes, is_local, is_shared
from cae2pipe.artifacts.provenance import provenance, tell_changes
from cae2pipe.artifacts.staging import Stage, remove_stages
from cae2pipe.config.base import identity
from cae2pipe.config.extract import ExtractSettings, as_begun
from cae2pipe.errors import BadInputError, MismatchError, SourceError
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report, gigabytes
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import Shard, ShardSet, index_samples
from cae2pipe.shards.tar import write_samples
from cae2pipe.targets.calibration import Calibration, Fidelity, one_thread, summarise
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import unit_tokens
from cae2pipe.targets.encoding import EncodedBlock, Meter, encode_ahead, encode_tokens, lane_count, run_teacher
from cae2pipe.targets.images import images_name, images_path, kept_images, make_images
from cae2pipe.targets.rendering import Renderer, Task, block_tasks, render
from cae2pipe.targets.store import Layout, StoreWriter, pack_block
from cae2pipe.targets.stored_calibration import (
    CODEC,
    is_calibrated,
    read_calibration,
    store_calibration,
)
from cae2pipe.targets.target_set import (
    make_layout,
    recorded_view,
    store_name,
)
from cae2pipe.teachers.check import check_features
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher, TeacherOutput


def extract_targets(
    source: Path,
    out: Path,
    settings: ExtractSettings,
    report: Report,
    part: Part = WHOLE,
    calibrate_only: bool = False,
    remake: Collection[str] | None = None,
) -> TargetsBox:
    """Make, or go on making, the target set ``out`` from a shard set or a folder of images.

    Args:
        source: a shard set or a folder of images. ``out``: the target set's folder. Either may lie on a remote place.
        part: which share of the shards is made here; torchrun's ranks share it.
        calibrate_only: stop once the set has its calibration.
        remake: make these units again, whether they look whole or not, and nothing else.

    Raises:
        SourceError, TeacherError, MismatchError, ManifestError, LockedError: see their messages.
    """
    rank = torchrun_rank()
    part = part.split(rank.rank, rank.ranks)
    set_backends()
    with writing(out, part):
        # Whatever can be wrong is found before hours of sharding.
        refuse_foreign(out)
        begun = file_size(out / MANIFEST) is not None
        if begun:
            settings = resumed(TargetsBox.open(out), settings, report)
            refuse_other_pixels(out, settings)
        teacher = load_teacher(settings.teacher, pick_device(settings.speed.device, rank))
        content = {"settings": identity(settings), "teacher": teacher.info.identity()}
        fix = "give another output folder, or the settings this one was made with"
        if begun:
            TargetsBox.open_same(out, content, fix)
        shards = open_source(source, out, settings, report)
        box = TargetsBox.open_or_create(out, content, facts={"classes": shards.classes}, fix=fix)
        missing = missing_views(box, shards, settings.views, part, remake)
        remove_leftovers(out, missing, part)
        box.facts |= {"classes": shards.classes, "wanted": wanted(box, shards, settings.views)}
        if not missing and is_calibrated(box) and (box.complete or part != WHOLE) and remake is None:
            holds = f"all {settings.views} views of " + (f"part {part}" if part != WHOLE else "all shards")
            report.log(f"nothing to do: {out} holds {holds} ({len(shards.shards)} shards)")
            finish(box, shards, settings.views)
            return box
        workers = -(-worker_count(settings.speed.workers) // rank.on_machine)
        if not (is_shared(out) and is_shared(source)):
            workers = 0  # what lies in this process's memory is seen by no other
        tell_changes(box.facts, teacher.device, report)
        if remake is not None and CODEC in remake:
            make_calibration(box, shards, teacher, settings, workers, report)
        box = with_calibration(box, shards, teacher, settings, workers, part, report)
        if calibrate_only:
            report.log("calibrated; nothing else was asked for")
            return box
        check_space(box, missing)
        try:
            reducing = [lacking.shard for lacking in missing if lacking.images]
            make_images(box, shards, reducing, settings.view, workers, report)
            if any(lacking.views for lacking in missing):
                make_views(box, shards, missing, teacher, settings, workers, report)
        finally:
            finish(box, shards, settings.views)
        return box


def resumed(box: TargetsBox, settings: ExtractSettings, report: Report) -> ExtractSettings:
    """The settings with what was not given as the set has been begun with: a changed default must neither refuse the
    command that began it nor add views to it."""
    found: dict[str, Any] = {"codec": as_begun(settings.codec, box.identity["settings"]["codec"])}
    # Early sets do not say what they were to hold.
    if "views" not in settings.model_fields_set and "wanted" in box.facts:
        found["views"] = box.facts["wanted"]["views"]
    begun = settings.model_copy(update=found)
    if begun != settings:
        report.log(f"as this set was begun: --views {begun.views} --fidelity {begun.codec.fidelity:g}")
    return begun


def refuse_other_pixels(out: Path, settings: ExtractSettings) -> None:
    """Raise MismatchError where a set's views are replayed and stored ones are asked for, or the reverse."""
    there = recorded_view(TargetsBox.open(out).identity["settings"]).pixels
    if there != settings.view.pixels:
        raise MismatchError(
            f"this set's views are {there}, and {settings.view.pixels} ones are asked for",
            where=out / MANIFEST,
            fix=f"--set view.pixels={there}, or give another output folder",
        )


def open_source(source: Path, out: Path, settings: ExtractSettings, report: Report) -> ShardSet:
    """The shard set to read: the source itself, or one made from a folder of images inside ``out``."""
    if is_box(source, "shards"):
        return ShardSet.open(source)
    if is_box(source):
        raise SourceError("this folder is not a shard set", where=source, fix="give a shard set or a folder of images")
    with holding(out, "sharding", lambda: report.log("waiting for another process to shard the images")):
        report.log(f"sharding {source} into {out / 'shards'}")
        return build_shard_set(source, out / "shards", settings.shard, report)


@dataclass(frozen=True)
class MissingUnits:
    """What a shard lacks: views, and the images that replayed ones are cut from."""

    shard: Shard
    views: tuple[int, ...]
    images: bool

    @property
    def units(self) -> list[str]:
        images = [images_name(self.shard.name)] if self.images else []
        return images + [store_name(view, self.shard.name) for view in self.views]


def missing_views(
    box: TargetsBox, shards: ShardSet, views: int, part: Part = WHOLE, remake: Collection[str] | None = None
) -> list[MissingUnits]:
    """What this part still has to make, or what of it is among ``remake``.

    Raises:
        MismatchError: a stored view was made from a shard of this name with other content.
    """
    whole = box.whole()
    replayed = recorded_view(box.identity["settings"]).pixels == "replayed"
    result = []
    for index, shard in enumerate(shards.shards):
        names = {view: store_name(view, shard.name) for view in range(views)}
        images = images_name(shard.name)
        for name in (*names.values(), images):
            unit = box.units.get(name)
            if unit and "shard" in unit and unit["source"] != shard.sha256:
                raise MismatchError(
                    f"shard {shard.name} of the source is not the one that this target set was made from",
                    where=shard.path,
                    fix="give the original source, or a new output folder",
                )

        def is_missing(name: str) -> bool:
            return name in remake if remake is not None else name not in whole

        lacking = MissingUnits(
            shard, tuple(view for view, name in names.items() if is_missing(name)), replayed and is_missing(images)
        )
        if lacking.units and part.owns(index):
            result.append(lacking)
    return result


def remove_leftovers(out: Path, missing: list[MissingUnits], part: Part) -> None:
    """Remove what a killed run left half-written, and never what another part is writing now."""
    if part == WHOLE and is_local(out):
        remove_debris(out)
    remove_stages(out, [name for lacking in missing for name in lacking.units])


def wanted(box: TargetsBox, shards: ShardSet, views: int) -> Wanted:
    """What the whole set is to hold, for those who ask how complete it is."""
    before = box.facts.get("wanted")
    most = max(views, before["views"] if before else 0)
    return {"views": most, "shards": len(shards.shards), "images": shards.images}


def finish(box: TargetsBox, shards: ShardSet, views: int) -> None:
    """Write the manifest; the set is complete once every part has made its share."""
    box.save(complete=lambda merged: CODEC in merged.units and not missing_views(merged, shards, views))


def with_calibration(
    box: TargetsBox,
    shards: ShardSet,
    teacher: Teacher,
    settings: ExtractSettings,
    workers: int,
    part: Part,
    report: Report,
) -> TargetsBox:
    """The box with its calibration, made or restored by whoever comes first while all others wait.

    Raises:
        BadInputError: several parts start without it where nobody can be kept from making it twice. DamageError: it was
            there, and does not come out the same.
    """
    if is_calibrated(box):
        return box
    if part != WHOLE and not can_lock(box.root):
        raise BadInputError(
            "this storage cannot create a file only if it is absent, so parts cannot agree on who calibrates",
            where=box.root,
            fix="run the same command once with --calibrate-only and without --part, then start the parts",
        )
    facts = box.facts
    with holding(box.root, "calibration", lambda: report.log("waiting for another process to calibrate")):
        box = TargetsBox.open(box.root)
        box.facts |= facts
        if not is_calibrated(box):
            make_calibration(box, shards, teacher, settings, workers, report)
    return box


def make_calibration(
    box: TargetsBox, shards: ShardSet, teacher: Teacher, settings: ExtractSettings, workers: int, report: Report
) -> None:
    """Fit mean, basis and step on view 0 of the first images; shards are shuffled, so these are a fair sample.

    Raises:
        DamageError: the set had a calibration, and it does not come out the same.
    """
    codec = settings.codec
    report.log(f"calibrating the {codec.name} codec on up to {codec.calibration} images")
    outputs, jpegs = run_sample(shards, teacher, settings, workers)

    def facts(calibration: Calibration, fidelity: Fidelity) -> dict[str, Any]:
        told = teacher_facts(teacher, outputs[0])
        layout = make_layout(told, box.identity["settings"]["codec"], calibration)
        found = codec_facts(outputs, sum(map(len, jpegs)), layout, calibration, fidelity)
        return {"teacher": told, "codec": found, **provenance(teacher.device)}

    unit = torch.cat([unit_tokens(output.tokens)[0] for output in outputs])
    store_calibration(box, codec, unit, facts, report)


def run_sample(
    shards: ShardSet, teacher: Teacher, settings: ExtractSettings, workers: int
) -> tuple[list[TeacherOutput], list[bytes]]:
    """The teacher's outputs, on the CPU, block by block, on view 0 of the first images; and what is kept of these
    pixels, the views' JPEGs or those of the images that they are replayed from."""
    tasks, taken = [], 0
    for shard in shards.shards:
        for number in range(-(-shard.samples // BLOCK)):
            if taken < settings.codec.calibration:
                tasks.append(Task(shard, number, (0,)))
                taken += min(BLOCK, shard.samples - number * BLOCK)
    outputs, jpegs = [], []
    lanes = lane_count(settings.speed.lanes, teacher.device)
    with closing(render(Renderer(shards, tasks, settings.view, settings.seed), workers)) as rendered:
        for block, output in run_teacher(rendered, teacher, lanes):
            where = f"shard {block.task.shard.name}, block {block.task.block}"
            check_features(output.tokens, where=where, constant=True)
            outputs.append(output)
            jpegs += block.kept or block.jpegs[0]
    return outputs, jpegs


def teacher_facts(teacher: Teacher, output: TeacherOutput) -> TeacherEntry:
    """What readers of a set must know of its teacher."""
    info = teacher.info
    return {
        "name": info.name,
        "dim": info.dim,
        "rows": info.rows,
        "cols": info.cols,
        "class_token": info.class_token,
        "attention": output.attention is not None,
    }


def codec_facts(
    outputs: list[TeacherOutput], pixels: int, layout: Layout, calibration: Calibration, fidelity: Fidelity
) -> dict[str, Any]:
    """What calibration found, and the bytes that it lets expect: of a view's latents, and of the pixels of a view, or
    of an image where views are replayed."""
    samples = sum(len(output.tokens) for output in outputs)
    latents = 0
    with one_thread():  # as when blocks are encoded
        for output in outputs:
            arrays, _, _ = encode_tokens(output.tokens, output.attention, layout, calibration)
            latents += sum(map(len, pack_block(layout, arrays).values()))
    return {
        "held_out_fidelity": asdict(fidelity),
        "step": calibration.step,
        "expected_bytes": {"latents": latents // samples, "pixels": pixels // samples},
    }


TAR_OVERHEAD = 2048
"""Bytes a sample that a tar adds to its JPEG, at least: two headers, the label, padding."""


def check_space(box: TargetsBox, missing: list[MissingUnits]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        BadInputError: with what is needed and what is free.
    """
    free = free_bytes(box.root)
    expected = box.facts["codec"]["expected_bytes"]
    replayed = recorded_view(box.identity["settings"]).pixels == "replayed"
    needed = sum(
        lacking.shard.samples
        * (
            len(lacking.views) * expected["latents"]
            + (lacking.images if replayed else len(lacking.views)) * (expected["pixels"] + TAR_OVERHEAD)
        )
        for lacking in missing
    )
    if free is not None and needed > free:
        raise BadInputError(
            f"the views that are still to be made need about {gigabytes(needed)}, and {gigabytes(free)} are free",
            where=box.root,
            fix="free some space, ask for fewer --views or a lower --fidelity, or give a folder on another disk",
        )


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


def make_views(
    box: TargetsBox,
    shards: ShardSet,
    missing: list[MissingUnits],
    teacher: Teacher,
    settings: ExtractSettings,
    workers: int,
    report: Report,
) -> Meter:
    """Render, encode and write all missing views; workers, device, packing and writing are at work at once."""
    calibration = read_calibration(box)
    layout = make_layout(box.facts["teacher"], box.identity["settings"]["codec"], calibration)
    replayed = settings.view.pixels == "replayed"
    if replayed:
        # Views are cut from the images that the set keeps, not from the originals.
        shards = kept_images(box)
    by_name = {shard.name: shard for shard in shards.shards}
    tasks = [
        task for lacking in missing if lacking.views for task in block_tasks(by_name[lacking.shard.name], lacking.views)
    ]
    report.total(sum(lacking.shard.samples * len(lacking.views) for lacking in missing), "views")
    rendered = render(Renderer(shards, tasks, settings.view, settings.seed, kept=replayed), workers)
    meter, lanes = Meter(), lane_count(settings.speed.lanes, teacher.device)
    encoded = encode_ahead(rendered, teacher, layout, calibration, meter, lanes)
    open_shards: deque[_Shard] = deque()
    finishing: deque[Future[None]] = deque()
    # Workers are ended whatever happens here: one that is stuck would hold up the end of this process.
    with closing(rendered), ThreadPoolExecutor(1) as finisher:
        try:
            # Blocks come in task order, so one shard's blocks are neighbours.
            for shard, blocks in groupby(encoded, key=lambda block: block.rendered.task.shard):
                current = _Shard(shard)
                open_shards.append(current)
                collect(current, box.root, layout, blocks, meter, report)
                finishing.append(finisher.submit(finish_shard, box, current, shards if replayed else None, report))
                while finishing and (len(finishing) > 1 or finishing[0].done()):
                    finishing.popleft().result()
                    open_shards.popleft()
            for future in finishing:
                future.result()
                open_shards.popleft()
        finally:
            finisher.shutdown(wait=True, cancel_futures=True)
            for left in open_shards:
                for pair in left.pairs.values():
                    pair.discard()
    meter.ended = time.perf_counter()
    report.log(f"{meter.views} views, {meter.rate():.0f} a second; {meter.verdict()} (it waited {meter.waits():.0%})")
    return meter


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
            writer = StoreWriter(stage.path(zarr_path(view, current.shard)), layout)
            current.pairs[view] = _Pair(stage, writer)
        pair = current.pairs[view]
        pair.writer.append(block.chunks, len(rendered.keys))
        pair.rendered.append((rendered.jpegs[block.place], rendered.draws[block.place]))
        pair.raw.append(block.raw)
        pair.centred.append(block.centred)
        report.advance(len(rendered.keys), views_per_s=meter.rate(), teacher_waits=meter.waits())


def tar_path(view: int, shard: Shard) -> str:
    return f"views/v{view:02d}/{shard.name}.tar"


def zarr_path(view: int, shard: Shard) -> str:
    return f"latents/v{view:02d}/{shard.name}.zarr"


def finish_shard(box: TargetsBox, current: _Shard, kept: ShardSet | None, report: Report) -> None:
    """Write the tars of stored views, finish the stores and list the pairs of a shard. ``kept``: the images that
    replayed views are cut from."""
    for view, pair in sorted(current.pairs.items()):
        name = store_name(view, current.shard.name)
        unit = finish_pair(box, current, view, pair, kept)
        if name in box.units and box.units[name]["files"] != unit["files"]:
            report.log(f"{name} does not come out as it was: runs that began with it cannot be resumed")
        box.add(store_name(view, current.shard.name), unit)
        pair.stage.discard()


def finish_pair(box: TargetsBox, current: _Shard, view: int, pair: _Pair, kept: ShardSet | None) -> Store:
    """Finish the store of one view of one shard, and its tar where views are stored; return the manifest's entry."""
    keys, labels, jpegs = current.keys, np.concatenate(current.labels), pair.jpegs
    name, zarr = current.shard.name, zarr_path(view, current.shard)
    if kept:
        tar, index = images_path(name), kept.index(current.shard)
    else:
        tar = tar_path(view, current.shard)
        write_samples(pair.stage.path(tar), zip(keys, labels.tolist(), jpegs, strict=True))
        index = index_samples(pair.stage.path(tar), [google_crc32c.value(jpeg) for jpeg in jpegs])
    assert [sample.key for sample in index] == keys
    members = np.array([(sample.offset, sample.size, sample.crc32c) for sample in index], dtype=np.int64)
    fidelity = summarise(torch.cat(pair.raw), torch.cat(pair.centred)).entry()
    pair.writer.finish(
        keys,
        labels,
        np.concatenate([draws for _, draws in pair.rendered]),
        members,
        {"codec": pair.writer.layout.codec.name, "view": view, "shard": name, "fidelity": fidelity},
    )
    files = pair.stage.commit(zarr) if kept else pair.stage.commit(tar, zarr)
    images = box.units[images_name(name)] if kept else None
    source = images["source"] if images and "shard" in images else current.shard.sha256
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
