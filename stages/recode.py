"""Convert a target set to another codec or fidelity, without the teacher.

The pixels of the views are the same files (hard links if both sets are on one disk); a set by reference gives another
one. Latents are decoded, encoded again and written as in extraction. A codec is calibrated once, on the same images as
in an extraction. All arithmetic that determines bytes runs on the CPU with one thread per block, so the same set gives
the same bytes, with any number of workers and after any interruption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact, refuse_foreign
from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.copying import copy_units
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.manifest_targets import StoreUnit, group_entries, listed
from cae2pipe.artifacts.provenance import provenance, tell_changes
from cae2pipe.artifacts.staging import remove_stages, staged
from cae2pipe.artifacts.storage import fetch_file, file_size, is_local
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.extract import CodecSettings, as_begun
from cae2pipe.errors import BadInputError, DamageError, MismatchError, command
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.threads import in_threads
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.encoding import encode_unit_tokens
from cae2pipe.targets.groups import Cosines, Groups, make_groups, reached, read_groups, store_facts
from cae2pipe.targets.images import images_units
from cae2pipe.targets.manifest_facts import codec_facts
from cae2pipe.targets.paths import CODEC, TEACHERS_FOLDER
from cae2pipe.targets.shared_pixels import added_sets
from cae2pipe.targets.store import StoreReader
from cae2pipe.targets.store_layout import PATCHES, StoreLayout, array_name, arrays_of
from cae2pipe.targets.store_writing import StoreWriter, pack_block
from cae2pipe.targets.stored_calibration import Fitted, is_calibrated, store_calibration
from cae2pipe.targets.target_set import TargetSet


def recode(
    source: Path,
    out: Path,
    codec: CodecSettings,
    *,
    report: Report,
    lossy_source: bool = False,
    workers: int = -1,
    remake: Collection[str] | None = None,
) -> TargetsArtifact:
    """Make, or resume making, the target set ``out`` from the target set ``source``.

    Args:
        codec: the codec of the latents in ``out``.
        lossy_source: allow a source that is not fp16; its codec's error is added to that of the new one.
        remake: make exactly these units again, even if they look complete.

    Raises:
        BadInputError: the source is lossy. MismatchError: ``out`` was made from other targets or settings.
        ManifestError: ``source`` is not a target set, or ``out`` is something else. DamageError: the source is damaged.
    """
    set_backends()
    targets = TargetSet(source)
    old = targets.artifact.identity["settings"]["codec"]
    if old["name"] != "fp16" and not lossy_source:
        raise BadInputError(
            f"this set's latents are stored with {old['name']}, whose error would be added to the new codec's",
            where=source,
            fix="use a set extracted with --codec fp16, or allow this with --lossy-source",
        )
    if is_local(out) and is_local(source) and source.resolve() in out.resolve().parents:
        raise BadInputError("the output folder is inside the source", where=out, fix="use another output folder")
    with writing(out):
        refuse_foreign(out)
        if file_size(out / MANIFEST) is not None:
            codec = as_begun(codec, TargetsArtifact.open(out).identity["settings"]["codec"])
        artifact = TargetsArtifact.open_or_create(
            out,
            {
                "settings": {**targets.artifact.identity["settings"], "codec": fingerprinted(codec)},
                "teacher": targets.artifact.identity["teacher"],
                "recoded": {"codec": old, "calibration": targets.artifact.units[CODEC]["files"]},
            },
            facts={"classes": targets.classes},
            fix="use another output folder, or the set and settings this one was made from",
            format=targets.artifact.format,
        )
        if artifact.by_reference != targets.artifact.by_reference:
            raise MismatchError(
                "of the source and of this set, one holds its pixels and the other is by reference",
                where=out,
                fix="use another output folder, or the set this one was made from",
            )
        missing = missing_stores(artifact, targets)
        images = missing_images(artifact, targets)
        if remake is not None:
            missing = sorted(targets.stores.keys() & set(remake))
            images = sorted(set(images) | (images_units(targets.artifact).keys() & set(remake)))
        if is_local(out):
            remove_debris(out)
        remove_stages(out, [*missing, *images])
        # Sets of early versions do not record all of this.
        facts = targets.artifact.facts
        known = {name: value for name, value in facts.items() if name in ("classes", "teacher", "wanted", "licences")}
        made_with = {name: value for name, value in facts.items() if name in ("versions", "processor")}
        artifact.add_facts({**known, "extracted": made_with})
        tell_changes(artifact.facts, torch.device("cpu"), report)
        if not is_calibrated(artifact) or CODEC in (remake or ()):
            recalibrate(artifact, targets, codec, report=report)
        elif not missing and not images:
            report.log(f"nothing to do: {out} has {counted(len(targets.stores), 'store')}, all of {source}")
        try:
            if images:
                report.phase("copying the images")
                report.total(len(images), "shards")
            fix = command("verify", source, "--repair")
            copy_units(artifact, targets.artifact, images, fix=fix, report=report)
            if missing:
                recode_stores(artifact, targets, missing, workers=worker_count(workers), report=report)
        finally:
            artifact.save(
                complete=lambda merged: (
                    targets.artifact.complete
                    and not missing_stores(merged, targets)
                    and not missing_images(merged, targets)
                )
            )
    for folder in added_sets(source) if remake is None else ():
        report.log(f"not recoded with the set, its added teacher {folder.name}: {recoding(folder, out, codec)}")
    return artifact


def recoding(added: Path, out: Path, codec: CodecSettings) -> str:
    """The command that recodes the set of an added teacher into ``out``."""
    lossy = TargetsArtifact.open(added).identity["settings"]["codec"]["name"] != "fp16"
    options = ["--codec", codec.name]
    options += ["--fidelity", f"{codec.fidelity:g}"] if codec.name == "klt" else []
    options += ["--lossy-source"] if lossy else []
    return command("recode", added, out / TEACHERS_FOLDER / added.name, *options)


def missing_stores(artifact: TargetsArtifact, targets: TargetSet) -> list[str]:
    """Stores of the source that are not in ``artifact`` yet.

    Raises:
        MismatchError: a store was recoded from a different store of that name.
    """
    whole = artifact.whole()
    for name, unit in targets.stores.items():
        own = artifact.units.get(name)
        if own and "view" in own and own["recoded"] != fingerprint(listed(unit)):
            raise MismatchError(
                f"store {name} of the source differs from the one that this set was recoded from",
                where=targets.root,
                fix="use the original source, or a new output folder",
            )
    return [name for name in sorted(targets.stores) if name not in whole]


def missing_images(artifact: TargetsArtifact, targets: TargetSet) -> list[str]:
    """Units of the source's images, from which views are cut, that are missing or differ from the source."""
    whole = artifact.whole()
    return [
        name
        for name, unit in images_units(targets.artifact).items()
        if name not in whole or listed(artifact.units[name]) != listed(unit)
    ]


def recalibrate(artifact: TargetsArtifact, targets: TargetSet, codec: CodecSettings, *, report: Report) -> None:
    """Fit the codec on view 0 of the first images, as an extraction does.

    Raises:
        DamageError: the set had a calibration, and it cannot be reproduced.
    """
    report.phase(f"calibrating the {codec.name} codec on up to {codec.calibration} images")

    def sample(layout: StoreLayout) -> Tensor:
        found: list[Tensor] = []
        for name in sorted(targets.stores):
            reader = targets.reader(name, [layout.group])
            for block in range(reader.blocks if targets.stores[name]["view"] == 0 else 0):
                if sum(map(len, found)) < codec.calibration:
                    found.append(stored_unit(reader, block, layout))
        return torch.cat(found)

    def facts(fitted: Mapping[str, Fitted]) -> dict[str, Any]:
        entries = group_entries(targets.artifact.facts["teacher"], codec.name, codec.level)
        groups = make_groups(entries, {name: calibration for name, (calibration, _) in fitted.items()})
        of_codec = codec_facts(groups, {name: fidelity for name, (_, fidelity) in fitted.items()})
        return {**provenance(torch.device("cpu")), "codec": of_codec, "groups": entries}

    samples = ((name, sample(group.layout)) for name, group in targets.groups.items())
    store_calibration(artifact, codec, samples, facts=facts, report=report)


def stored_unit(reader: StoreReader, block: int, layout: StoreLayout) -> Tensor:
    """The unit tokens of a group of a stored block, float32 (b, T, D)."""
    codec = layout.codec
    arrays = reader.arrays(block, [array_name(layout.group, name) for name in codec.arrays()])
    return unit_tokens(codec.decode(as_tensors(arrays_of(layout.group, arrays))))[0]


class RecodedBlock(NamedTuple):
    """A block of the new store: chunks by array, its samples, and the cosines of its tokens by group."""

    chunks: dict[str, list[bytes]]
    samples: int
    cosines: dict[str, Cosines]


def recode_block(reader: StoreReader, block: int, old: Groups, new: Groups) -> RecodedBlock:
    """Decode and encode the groups of a block; norms and attention are copied."""
    chunks: dict[str, list[bytes]] = {}
    cosines: dict[str, Cosines] = {}
    samples = 0
    for name, group in new.items():
        unit = stored_unit(reader, block, old[name].layout)
        arrays, raw, centred = encode_unit_tokens(unit, group.layout, group.calibration)
        kept = [array_name(name, side) for side in ("norms", "attention") if side in group.layout.blocked()]
        chunks |= pack_block(group.layout, {**arrays, **arrays_of(name, reader.arrays(block, kept))})
        cosines[name] = raw, centred
        samples = len(unit)
    return RecodedBlock(chunks, samples, cosines)


def recode_stores(
    artifact: TargetsArtifact, targets: TargetSet, names: list[str], *, workers: int, report: Report
) -> None:
    """Write the stores with these names; threads work some blocks ahead."""
    groups = read_groups(artifact)
    report.phase("recoding")
    report.total(sum(targets.stores[name]["samples"] for name in names), "views")
    readers = {name: targets.reader(name, groups) for name in names}
    tasks = ((readers[name], block, targets.groups, groups) for name in names for block in range(readers[name].blocks))
    with closing(in_threads(recode_block, tasks, workers, most=2 * max(1, workers))) as blocks:
        for name in names:
            artifact.add(name, recode_store(artifact.root, targets, name, groups=groups, blocks=blocks, report=report))


def recode_store(
    root: Path,
    targets: TargetSet,
    name: str,
    *,
    groups: Groups,
    blocks: Iterator[RecodedBlock],
    report: Report,
) -> StoreUnit:
    """Write one store, and copy its tar if views are stored; return the manifest's entry.

    Args:
        blocks: the blocks of this store, followed by those of others.
    """
    unit, reader = targets.stores[name], targets.reader(name)
    own = [unit["tar"]] if targets.replayed is None and not targets.artifact.by_reference else []
    with staged(root, name) as stage:
        for tar in own:
            fetch_file(reader.root / tar, stage.path(tar))
        writer = StoreWriter(stage.path(unit["zarr"]), *(group.layout for group in groups.values()))
        cosines = []
        try:
            for _ in range(reader.blocks):
                block = next(blocks)
                writer.append(block.chunks, block.samples)
                cosines.append(block.cosines)
                report.advance(block.samples)
            fidelity = reached(cosines)
            attributes = {"view": unit["view"], "shard": unit["shard"], "fidelity": fidelity[PATCHES]}
            writer.finish(reader.records(), attributes)
        finally:
            writer.close()
        if any(stage.entries(tar)[tar] != unit["files"][tar] for tar in own):
            fix = command("verify", reader.root, "--repair")
            raise DamageError("the source's tar is damaged", where=reader.tar, fix=fix)
        files = stage.commit(*own, unit["zarr"])
    facts = store_facts(writer.layouts, unit["zarr"], files, fidelity, pixels=unit["bytes"]["pixels"])
    new: StoreUnit = {
        "view": unit["view"],
        "shard": unit["shard"],
        "source": unit["source"],
        "samples": unit["samples"],
        "tar": unit["tar"],
        "zarr": unit["zarr"],
        "files": files,
        "fidelity": facts["fidelity"],
        "bytes": facts["bytes"],
        "recoded": fingerprint(listed(unit)),
    }
    if "groups" in facts:
        new["groups"] = facts["groups"]
    if targets.replayed is None and "pixels" in unit:
        new["pixels"] = unit["pixels"]
    return new
