"""Convert a target set of an earlier format to the newest one, without the teacher and without changing a symbol.

Pixels are the same files (hard links if both sets are on one disk), latents are decompressed and compressed again. The
new set has the identity of the old one: `cae2pipe extract-targets` with the arguments of before resumes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from cae2pipe.artifacts.artifact import ShardsArtifact, TargetsArtifact, is_artifact, refuse_foreign
from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.copying import copy_units
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.manifest_targets import StoreUnit, group_entry
from cae2pipe.artifacts.staging import remove_stages, staged
from cae2pipe.artifacts.storage import fetch_file, is_local
from cae2pipe.errors import BadInputError, DamageError, ManifestError, command
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.threads import in_threads
from cae2pipe.targets.calibration import Calibration
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.earlier_store import FIX, EarlierStore
from cae2pipe.targets.groups import make_layout
from cae2pipe.targets.images import images_units
from cae2pipe.targets.paths import CODEC, CODEC_FOLDER, SHARDS_FOLDER
from cae2pipe.targets.store_layout import PATCHES, StoreLayout
from cae2pipe.targets.store_writing import StoreWriter, pack_block
from cae2pipe.targets.stored_calibration import read_calibration, write_calibration


def repack(source: Path, out: Path, *, report: Report, workers: int = -1) -> TargetsArtifact:
    """Make, or resume making, the set ``out`` from the set ``source`` of an earlier format.

    Stores and images of which a file is missing are omitted, and logged.

    Raises:
        ManifestError: ``source`` is not a target set, or one of the newest format, or not calibrated; or ``out`` is
            something else. MismatchError: ``out`` is of other targets. DamageError: the source is damaged.
    """
    earlier = TargetsArtifact.open_earlier(source)
    if CODEC not in earlier.units:
        raise ManifestError("this set has no finished store", where=source, fix="extract it again")
    if is_local(out) and is_local(source) and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInputError("the output folder is inside the source", where=out, fix="use another output folder")
    calibration = read_calibration(earlier, group="")
    codec = earlier.identity["settings"]["codec"]
    group = group_entry(earlier.facts["teacher"], codec["name"], codec["level"])
    with writing(out):
        refuse_foreign(out)
        artifact = TargetsArtifact.open_or_create(
            out, earlier.identity, facts={}, fix="use another output folder, or the set that this one was made from"
        )
        artifact.add_facts({**earlier.facts, "groups": {PATCHES: group}})
        if is_local(out):
            remove_debris(out)
        sound, there = earlier.whole(), artifact.whole()
        if lost := sorted(earlier.units.keys() - sound):
            shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
            report.log(f"units without all of their files are omitted, {len(lost)} of {len(earlier.units)}: {shown}")
        wanted = sorted(sound - there - {CODEC})
        remove_stages(out, wanted)
        kept = images_units(earlier)
        images = [name for name in wanted if name in kept]
        stores = {name: unit for name in wanted if "view" in (unit := earlier.units[name])}
        if CODEC not in there:
            copy_calibration(artifact, calibration, samples=earlier.units[CODEC]["samples"])
        try:
            copy_units(artifact, earlier, images, fix=FIX, report=report)
            layout = make_layout(group, calibration)
            repack_stores(artifact, source, stores, layout=layout, workers=worker_count(workers), report=report)
            copy_shards(source / SHARDS_FOLDER, out / SHARDS_FOLDER, report=report)
        finally:
            artifact.save(complete=lambda merged: earlier.complete and earlier.units.keys() <= merged.whole())
        if not wanted:
            report.log(f"nothing to do: {out} has all {len(sound)} units of {source}")
    return artifact


def copy_calibration(artifact: TargetsArtifact, calibration: Calibration, *, samples: int) -> None:
    """Write the calibration, of that many samples."""
    # The facts first: a codec without them would count as a finished calibration.
    artifact.save()
    with staged(artifact.root, CODEC) as stage:
        write_calibration(stage.path(CODEC_FOLDER), {PATCHES: calibration})
        artifact.add(CODEC, {"files": stage.commit(CODEC_FOLDER), "samples": samples})


def repack_stores(
    artifact: TargetsArtifact,
    source: Path,
    stores: Mapping[str, StoreUnit],
    *,
    layout: StoreLayout,
    workers: int,
    report: Report,
) -> None:
    """Write these stores; threads work some blocks ahead. Raises DamageError: one of the source is damaged."""
    report.phase("repacking")
    report.total(sum(unit["samples"] for unit in stores.values()), "views")
    readers = {name: EarlierStore(source, unit, layout) for name, unit in stores.items()}
    tasks = ((reader, block) for reader in readers.values() for block in range(reader.blocks))
    pack = lambda reader, block: pack_block(layout, reader.arrays(block))  # noqa: E731
    with closing(in_threads(pack, tasks, workers, most=2 * max(1, workers))) as blocks:
        for name, unit in stores.items():
            artifact.add(
                name, repack_store(artifact.root, source, name, unit=unit, reader=readers[name], blocks=blocks)
            )
            report.advance(unit["samples"])


def repack_store(
    root: Path,
    source: Path,
    name: str,
    *,
    unit: StoreUnit,
    reader: EarlierStore,
    blocks: Iterator[Mapping[str, Sequence[bytes]]],
) -> StoreUnit:
    """Write one store, and copy its tar if views are stored; return the manifest's entry.

    Args:
        blocks: the packed blocks of this store, followed by those of others.
    """
    own, layout = [unit["tar"]] if unit["tar"] in unit["files"] else [], reader.layout
    with staged(root, name) as stage:
        for tar in own:
            fetch_file(source / tar, stage.path(tar))
        if any(stage.entries(tar)[tar] != unit["files"][tar] for tar in own):
            raise DamageError("stored data are damaged: the tar has changed", where=source / unit["tar"], fix=FIX)
        writer = StoreWriter(stage.path(unit["zarr"]), layout)
        try:
            for block in range(reader.blocks):
                writer.append(next(blocks), min(BLOCK, reader.samples - block * BLOCK))
            attributes = {"view": unit["view"], "shard": unit["shard"], "fidelity": unit["fidelity"]}
            writer.finish(reader.records(), attributes)
        finally:
            writer.close()
        files = stage.commit(*own, unit["zarr"])
    latents = layout.latent_bytes(unit["zarr"], files)
    return {**unit, "files": files, "bytes": {"latents": latents, "pixels": unit["bytes"]["pixels"]}}


def copy_shards(source: Path, out: Path, *, report: Report) -> None:
    """Copy the shard set that the target set has in its folder, if there is one."""
    if not is_artifact(source, "shards"):
        return
    shards = ShardsArtifact.open(source)
    copied = ShardsArtifact.open_or_create(
        out, shards.identity, facts=shards.facts, fix="use another output folder for the new set"
    )
    names = sorted(shards.units.keys() - copied.whole())
    report.phase("copying the shard set")
    report.total(len(names), "files")
    copy_units(copied, shards, names, fix=command("verify", source, "--repair"), report=report)
    copied.save(complete=shards.complete)
