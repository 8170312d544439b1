"""Stage 1: images to views and the teacher's latents.

Read from top to bottom: open the source, load the teacher, calibrate the codec once, then shard by shard render the
views that are missing, run the teacher on what was stored, encode and write. A finished (view, shard) pair is never
made again; everything else is made so that the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import remove_debris, replacing
from cae2pipe.artifacts.box import Box, is_box, open_or_create, refuse_foreign
from cae2pipe.artifacts.digest import file_entry, tree_entries
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import identity
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import MismatchError, SourceError
from cae2pipe.images.views import decode_view
from cae2pipe.processes import worker_count
from cae2pipe.progress import Report
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import Shard, ShardSet
from cae2pipe.shards.tar import index_tar, write_samples
from cae2pipe.targets.calibration import Calibration, calibrate, summarise, token_cosines
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.rendering import RenderedBlock, Renderer, Task, render
from cae2pipe.targets.store import Layout, StoreWriter
from cae2pipe.targets.target_set import CODEC, make_layout, read_calibration, store_name, write_calibration
from cae2pipe.teachers.check import check_features
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.training.device import pick_device


def extract_targets(source: Path, out: Path, settings: ExtractSettings, report: Report) -> Box:
    """Make, or go on making, the target set ``out`` from a shard set or a folder of images.

    Raises:
        SourceError, TeacherError, MismatchError, ManifestError, LockedError: see their messages.
    """
    with writing(out):
        # Whatever can be wrong is found before hours of sharding.
        refuse_foreign(out)
        teacher = load_teacher(settings.teacher, pick_device(settings.speed.device))
        shards = open_source(source, out, settings, report)
        box = open_or_create(
            out,
            "targets",
            {"settings": identity(settings), "teacher": teacher.info.identity()},
            facts={"classes": shards.classes},
            fix="give another output folder, or the settings this one was made with",
        )
        for folder in ("views", "latents"):
            remove_debris(out / folder)
        missing = missing_views(box, shards, settings.views)
        box.facts["classes"] = shards.classes
        if not missing and CODEC in box.units and box.complete:
            report.log(f"nothing to do: {out} holds all {settings.views} views of all {len(shards.shards)} shards")
            return box
        workers = worker_count(settings.speed.workers)
        if CODEC not in box.units:
            make_calibration(box, shards, teacher, settings, workers, report)
        calibration = read_calibration(out / "codec.zarr")
        layout = make_layout(box.facts["teacher"], box.identity["settings"]["codec"], calibration)
        tasks = [Task(shard, block, views) for shard, views in missing for block in range(-(-shard.samples // BLOCK))]
        report.total(sum(shard.samples * len(views) for shard, views in missing), "views")
        rendered = render(Renderer(shards, tasks, settings.view, settings.seed), workers)
        try:
            # Blocks come in task order, so one shard's blocks are neighbours.
            for shard, blocks in groupby(rendered, key=lambda block: block.task.shard):
                write_shard(box, shard, blocks, teacher, layout, calibration, report)
        finally:
            box.save(complete=not missing_views(box, shards, settings.views))
        return box


def open_source(source: Path, out: Path, settings: ExtractSettings, report: Report) -> ShardSet:
    """The shard set to read: the source itself, or one made from a folder of images inside ``out``."""
    if is_box(source, "shards"):
        return ShardSet.open(source)
    if is_box(source):
        raise SourceError("this folder is not a shard set", where=source, fix="give a shard set or a folder of images")
    report.log(f"sharding {source} into {out / 'shards'}")
    return build_shard_set(source, out / "shards", settings.shard, report)


def missing_views(box: Box, shards: ShardSet, views: int) -> list[tuple[Shard, tuple[int, ...]]]:
    """What is still to be made: shards with the views they lack.

    Raises:
        MismatchError: a stored view was made from a shard of this name with other content.
    """
    result = []
    for shard in shards.shards:
        names = {view: store_name(view, shard.name) for view in range(views)}
        for name in names.values():
            unit = box.units.get(name)
            if unit and unit["source"] != shard.sha256:
                raise MismatchError(
                    f"shard {shard.name} of the source is not the one that this target set was made from",
                    where=shard.path,
                    fix="give the original source, or a new output folder",
                )
        lacking = tuple(view for view, name in names.items() if not box.has(name))
        if lacking:
            result.append((shard, lacking))
    return result


def make_calibration(
    box: Box, shards: ShardSet, teacher: Teacher, settings: ExtractSettings, workers: int, report: Report
) -> None:
    """Fit mean, basis and step on view 0 of the first images; shards are shuffled, so these are a fair sample."""
    codec = settings.codec
    tasks, taken = [], 0
    for shard in shards.shards:
        for number in range(-(-shard.samples // BLOCK)):
            if taken < codec.calibration:
                tasks.append(Task(shard, number, (0,)))
                taken += min(BLOCK, shard.samples - number * BLOCK)
    report.log(f"calibrating the {codec.name} codec on {taken} images")
    units, attention = [], False
    for block in render(Renderer(shards, tasks, settings.view, settings.seed), workers):
        output = run_teacher(teacher, block.jpegs[0])
        check_features(output.tokens, where=f"shard {block.task.shard.name}, block {block.task.block}", constant=True)
        attention = output.attention is not None
        units.append(unit_tokens(output.tokens)[0].cpu())
    calibration, fidelity = calibrate(torch.cat(units), codec.name, codec.fidelity, codec.level)
    info = teacher.info
    box.facts["teacher"] = {
        "name": info.name,
        "dim": info.dim,
        "rows": info.rows,
        "cols": info.cols,
        "class_token": info.class_token,
        "attention": attention,
    }
    box.facts["codec"] = {"held_out_fidelity": asdict(fidelity), "step": calibration.step}
    box.facts["versions"] = library_versions()
    files = write_calibration(box.root / "codec.zarr", calibration)
    # The facts first: a codec without them would be taken for a finished calibration.
    box.save()
    box.add(CODEC, {"files": files, "samples": taken})
    report.log(f"fidelity on held-out images: mean cosine {fidelity.mean:.5f}, 1st percentile {fidelity.p1:.5f}")


def run_teacher(teacher: Teacher, jpegs: Sequence[bytes]) -> Any:
    """The teacher's output on stored views."""
    pixels = np.stack([decode_view(jpeg) for jpeg in jpegs])
    device = teacher.device
    return teacher(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))


@dataclass
class _View:
    """One (view, shard) pair while it is written."""

    writer: StoreWriter
    jpegs: list[bytes]
    draws: list[np.ndarray]
    raw: list[Tensor]
    centred: list[Tensor]


def write_shard(
    box: Box,
    shard: Shard,
    blocks: Iterator[RenderedBlock],
    teacher: Teacher,
    layout: Layout,
    calibration: Calibration,
    report: Report,
) -> None:
    """Run the teacher over a shard's rendered blocks and write the pair (tar, store) of each of its views."""
    pairs: dict[int, _View] = {}
    try:
        keys, labels = fill_pairs(pairs, box.root, shard, blocks, teacher, layout, calibration, report)
        for view, pair in sorted(pairs.items()):
            box.add(store_name(view, shard.name), finish_pair(box.root, shard, view, pair, keys, labels))
    except BaseException:
        for pair in pairs.values():
            pair.writer.abort()
        raise


def fill_pairs(
    pairs: dict[int, _View],
    root: Path,
    shard: Shard,
    blocks: Iterator[RenderedBlock],
    teacher: Teacher,
    layout: Layout,
    calibration: Calibration,
    report: Report,
) -> tuple[list[str], np.ndarray]:
    """Run the teacher block by block and append to the views' stores, opened in ``pairs``. Returns keys and labels."""
    keys: list[str] = []
    labels: list[np.ndarray] = []
    # Compression and disk run beside the teacher; one block at a time, so that order and memory stay bounded.
    with ThreadPoolExecutor(1) as writer_thread:
        pending: Future[None] | None = None
        for block in blocks:
            keys += block.keys
            labels.append(block.labels)
            for place, view in enumerate(block.task.views):
                if view not in pairs:
                    path = root / "latents" / f"v{view:02d}" / f"{shard.name}.zarr"
                    pairs[view] = _View(StoreWriter(path, layout), [], [], [], [])
                pair = pairs[view]
                output = run_teacher(teacher, block.jpegs[place])
                check_features(output.tokens, where=f"shard {shard.name}, block {block.task.block}, view {view}")
                unit, norms = unit_tokens(output.tokens)
                arrays = layout.codec.encode(unit)
                raw, centred = token_cosines(unit, decode_on(layout, arrays, unit.device), calibration.mean)
                pair.raw.append(raw.cpu())
                pair.centred.append(centred.cpu())
                arrays["norms"] = norms.cpu().numpy().astype("<f2")
                if layout.attention:
                    arrays["attention"] = pack_attention(output.attention)
                pair.jpegs += block.jpegs[place]
                pair.draws.append(block.draws[place])
                if pending:
                    pending.result()
                pending = writer_thread.submit(pair.writer.append, arrays)
                report.advance(len(block.keys))
        if pending:
            pending.result()
    return keys, np.concatenate(labels)


def finish_pair(
    root: Path, shard: Shard, view: int, pair: _View, keys: list[str], labels: np.ndarray
) -> dict[str, Any]:
    """Write the tar and finish the store of one view of one shard; return the manifest's entry."""
    tar = root / "views" / f"v{view:02d}" / f"{shard.name}.tar"
    with replacing(tar) as temporary:
        write_samples(temporary, zip(keys, labels.tolist(), pair.jpegs, strict=True))
    index = index_tar(tar)
    assert [sample.key for sample in index] == keys
    checksums = [google_crc32c.value(jpeg) for jpeg in pair.jpegs]
    members = np.array([(s.offset, s.size, crc) for s, crc in zip(index, checksums, strict=True)], dtype=np.int64)
    fidelity = asdict(summarise(torch.cat(pair.raw), torch.cat(pair.centred)))
    pair.writer.finish(
        keys,
        labels,
        np.concatenate(pair.draws),
        members,
        {"codec": pair.writer.layout.codec.name, "view": view, "shard": shard.name, "fidelity": fidelity},
    )
    zarr = pair.writer.path
    files = {tar.relative_to(root).as_posix(): file_entry(tar), **tree_entries(zarr, root)}
    latents = sum(
        (zarr / name).is_dir() and tree_bytes(zarr / name) for name in (*pair.writer.layout.codec.arrays(), "norms")
    )
    return {
        "view": view,
        "shard": shard.name,
        "source": shard.sha256,
        "samples": len(keys),
        "tar": tar.relative_to(root).as_posix(),
        "zarr": zarr.relative_to(root).as_posix(),
        "files": files,
        "fidelity": fidelity,
        "bytes": {"latents": latents, "pixels": sum(len(jpeg) for jpeg in pair.jpegs)},
    }


def decode_on(layout: Layout, arrays: dict[str, np.ndarray], device: torch.device) -> Tensor:
    """The stored arrays decoded on a device, as training will."""
    return layout.codec.decode({name: tensor.to(device) for name, tensor in as_tensors(arrays).items()})


def pack_attention(attention: Tensor) -> np.ndarray:
    """Attention (b, P) as uint8, each image's largest value 255: only ratios within an image are used."""
    scaled = attention / attention.amax(dim=1, keepdim=True).clamp_min(1e-12) * 255
    return torch.round(scaled).to(torch.uint8).cpu().numpy()


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def library_versions() -> dict[str, str]:
    """Versions that byte identity is promised for."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "pillow", "numcodecs", "zarr", "timm", "open_clip_torch")}
