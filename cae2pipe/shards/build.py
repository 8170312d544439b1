"""Build a shard set from a source of images.

The order is one permutation of the whole source, split into groups of ``samples`` files, one tar per group. Every
image is decoded once as a check; images that cannot be decoded are omitted from their tar and listed in
``rejects.jsonl``, so a tar may hold fewer. A tar therefore depends only on the source and the settings, not on workers
or on where a run was interrupted. Images that are new in the source since the last run get another permutation and
their own tars.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path

import google_crc32c

from cae2pipe.artifacts.artifact import ShardsArtifact
from cae2pipe.artifacts.atomic import remove_debris, write_bytes
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.manifest_shards import ListingUnit, Rejected, TarUnit
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.staging import staged
from cae2pipe.artifacts.storage import file_size, is_local, read_bytes
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.extract import ShardSettings
from cae2pipe.errors import MismatchError, SourceError
from cae2pipe.runtime.keyed import keyed_permutation
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.checking import Checked, checking
from cae2pipe.shards.entries import Entry, Source
from cae2pipe.shards.listing import with_listings
from cae2pipe.shards.shard_set import REJECTS, ShardSet, index_path, tar_path, write_index
from cae2pipe.shards.source import scan
from cae2pipe.shards.tar import write_samples


def build_shard_set(source: Path, out: Path, settings: ShardSettings, *, report: Report) -> ShardSet:
    """Create or resume the shard set ``out`` from images.

    Raises:
        SourceError: the source cannot be used, or none of its images decoded. MismatchError: ``out`` was made from
            other images or settings. ManifestError: ``out`` holds something else. LockedError: another process
            writes it.
    """
    report.phase("listing the images")
    images = scan(source)
    refuse_inside(source, out)
    return pack(images, out, settings, report=report)


def pack(
    source: Source, out: Path, settings: ShardSettings, *, report: Report, remake: Collection[str] | None = None
) -> ShardSet:
    """``build_shard_set`` of a scanned source.

    Args:
        remake: rebuild only these units, whether they look intact or not.

    Raises:
        MismatchError: also if a rebuilt tar does not match the manifest.
    """
    if remake is None:
        for remark in source.remarks():
            report.log(remark)
    with writing(out):
        artifact = ShardsArtifact.open_or_create(
            out,
            {"settings": fingerprinted(settings), "classes": source.classes},
            facts={"rejected": 0},
            fix="give another output folder, or the source and settings that this one was made from",
        )
        if settings.licence:
            artifact.facts["licence"] = settings.licence
        if is_local(out):
            remove_debris(out)
        before = sum(unit["images"] for unit in artifact.units.values() if "images" in unit)
        runs = plan_runs(with_listings(source, artifact), settings)
        total = len(source.entries)
        if before and total > before:
            report.log(f"adding tars for {counted(total - before, 'new image')} of {total} in {source.root}")
        whole = artifact.whole()
        missing = {
            name: run for name, run in runs.items() if (name in remake if remake is not None else name not in whole)
        }
        if not missing and artifact.has(REJECTS) and artifact.complete and remake is None:
            finish_shards(artifact)  # a killed run may have left entries in the journal
            held = counted(total - artifact.facts["rejected"], "image")
            report.log(f"nothing to do: {out} holds {held}, all of {source.root}")
            return ShardSet.open(out)
        report.phase("checking and packing the images")
        report.total(total, "images", done=total - sum(map(len, missing.values())))
        with checking(settings.speed.workers) as check:
            # One stream over all tars: workers read ahead while a tar is finished.
            checked = check(source.piece(entry) for entry in chain.from_iterable(missing.values()))
            for name, run in missing.items():
                expected = artifact.units[name]["files"] if name in artifact.units else None
                artifact.add(
                    name,
                    write_run(
                        artifact.root, name, run, images=advancing(islice(checked, len(run)), report), expected=expected
                    ),
                )
        finish_shards(artifact)
        kept, rejected = sum(unit["samples"] for unit in artifact.units.values()), artifact.facts["rejected"]
        more = f"; {rejected} could not be decoded: see {out / 'rejects.jsonl'}" if rejected else ""
        report.log(f"wrote {counted(kept, 'image')}{more}")
        return ShardSet.open(out)


def plan_runs(generations: list[list[Entry]], settings: ShardSettings) -> dict[str, list[Entry]]:
    """The images of every tar, by its name."""
    runs: dict[str, list[Entry]] = {}
    for number, entries in enumerate(generations):
        order = keyed_permutation(len(entries), "shard", settings.seed, *([number] if number else []))
        shuffled = [entries[index] for index in order]
        for low in range(0, len(shuffled), settings.samples):
            runs[f"{len(runs):06d}"] = shuffled[low : low + settings.samples]
    return runs


def advancing(images: Iterator[Checked], report: Report) -> Iterator[Checked]:
    """The images, with progress shown as they are used."""
    for image in images:
        yield image
        report.advance()


def write_run(
    root: Path, name: str, run: list[Entry], *, images: Iterator[Checked], expected: dict[str, FileEntry] | None = None
) -> TarUnit:
    """Write a tar of those images that can be decoded, and its index; return the manifest's entry.

    Args:
        expected: the files of the same tar from an earlier run, if there are any.

    Raises:
        MismatchError: they differ now.
    """
    rejected: list[Rejected] = []
    checksums = []

    def kept() -> Iterator[tuple[str, int, bytes]]:
        for entry, image in zip(run, images, strict=True):
            if image.reason is None:
                checksums.append(google_crc32c.value(image.data))
                yield entry.key, entry.label, image.data
            else:
                rejected.append({"path": entry.path, "reason": image.reason})

    tar, index = tar_path(name), index_path(name)
    with staged(root, tar) as stage:
        write_samples(stage.path(tar), kept())
        pieces = (tar, index) if checksums else ()  # WebDataset refuses empty tars
        if checksums:
            write_index(stage.path(index), stage.path(tar), checksums)
        if expected is not None and stage.entries(*pieces) != expected:
            raise MismatchError(
                f"the images of tar {name} have changed since it was made",
                where=root / tar,
                fix="restore the original source, or make the shard set again in a new folder",
            )
        return {"files": stage.commit(*pieces), "samples": len(checksums), "rejected": rejected}


def finish_shards(artifact: ShardsArtifact) -> None:
    """Write ``rejects.jsonl`` and the manifest, unless they are up to date.

    Raises:
        SourceError: no image could be decoded.
    """
    rejects = rejected_images(artifact)
    rejects.sort(key=lambda reject: reject["path"])
    path = artifact.root / "rejects.jsonl"
    data = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode()
    if file_size(path) is None or read_bytes(path) != data:
        write_bytes(path, data)
    artifact.facts["rejected"] = len(rejects)
    unit: ListingUnit = {"files": {path.name: file_entry(path)}, "samples": 0}
    if artifact.units.get(REJECTS) != unit:
        artifact.add(REJECTS, unit)
    artifact.save(complete=True)
    refuse_empty(artifact)


def rejected_images(artifact: ShardsArtifact) -> list[Rejected]:
    """The images that could not be decoded, in the order of tars."""
    return [reject for unit in artifact.units.values() if "rejected" in unit for reject in unit["rejected"]]


def refuse_empty(artifact: ShardsArtifact) -> None:
    """Raise SourceError if every image of the source was rejected."""
    if any(unit["samples"] for unit in artifact.units.values()):
        return
    reasons = [reject["reason"] for reject in rejected_images(artifact)]
    raise SourceError(
        f"none of the {counted(len(reasons), 'file')} can be decoded, e.g.: {reasons[0]}",
        where=artifact.root / "rejects.jsonl",
        fix="check the source: its files have image names but are not images",
    )


def refuse_inside(source: Path, out: Path) -> None:
    """Raise SourceError if the output folder is inside the source."""
    if is_local(out) and is_local(source) and out.resolve().is_relative_to(source.resolve()):
        raise SourceError(
            "the output folder is inside the source, and would be read as one of its classes",
            where=out,
            fix="give an output folder elsewhere",
        )
