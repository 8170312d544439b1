"""A source of images to a shard set.

The order is one permutation of the whole source, cut into runs of ``samples`` files, one tar a run. Every image is
decoded once to prove that it can be; what cannot is left out of its tar and listed in ``rejects.jsonl``, so a tar may
hold fewer. A tar thus depends on the source and the settings alone: not on workers, nor on where a run was broken off.
Images that are new in the source since the last run are one more permutation, with tars of their own.
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
from cae2pipe.shards.checking import Checked, checking
from cae2pipe.shards.entries import Entry, Source
from cae2pipe.shards.listing import with_listings
from cae2pipe.shards.shard_set import REJECTS, ShardSet, index_path, tar_path, write_index
from cae2pipe.shards.source import scan
from cae2pipe.shards.tar import write_samples


def build_shard_set(source: Path, out: Path, settings: ShardSettings, *, report: Report) -> ShardSet:
    """Make, or go on making, the shard set ``out`` from images.

    Raises:
        SourceError: the source cannot be used, or no image of it decoded. MismatchError: ``out`` was made from other
            images or settings. ManifestError: ``out`` holds something else. LockedError: another process writes it.
    """
    images = scan(source)
    refuse_inside(source, out)
    return pack(images, out, settings, report=report)


def pack(
    source: Source, out: Path, settings: ShardSettings, *, report: Report, remake: Collection[str] | None = None
) -> ShardSet:
    """``build_shard_set`` of a scanned source.

    Args:
        remake: make these units again, whether they look whole or not, and nothing else.

    Raises:
        MismatchError: also where a tar that is made again comes out otherwise than the manifest says.
    """
    if remake is None:
        for remark in source.remarks():
            report.log(remark)
    with writing(out):
        artifact = ShardsArtifact.open_or_create(
            out,
            {"settings": fingerprinted(settings), "classes": source.classes},
            facts={"rejected": 0},
            fix="give another output folder, or the source and settings this one was made from",
        )
        if is_local(out):
            remove_debris(out)
        before = sum(unit["images"] for unit in artifact.units.values() if "images" in unit)
        runs = plan_runs(with_listings(source, artifact), settings)
        total = len(source.entries)
        if before and total > before:
            report.log(f"new in {source.root}: {total - before} of {total} images, which go into tars of their own")
        whole = artifact.whole()
        missing = {
            name: run for name, run in runs.items() if (name in remake if remake is not None else name not in whole)
        }
        if not missing and artifact.has(REJECTS) and artifact.complete and remake is None:
            finish_shards(artifact)  # a run that was killed may have left its last words in the journal
            report.log(f"nothing to do: {out} holds all {total - artifact.facts['rejected']} images of {source.root}")
            return ShardSet.open(out)
        report.total(total, "images", done=total - sum(map(len, missing.values())))
        with checking(settings.speed.workers) as check:
            # One stream over all runs: workers read ahead while a tar is finished.
            checked = check(source.piece(entry) for entry in chain.from_iterable(missing.values()))
            for name, run in missing.items():
                expected = artifact.units[name]["files"] if name in artifact.units else None
                artifact.add(
                    name,
                    write_run(
                        artifact.root, name, run, images=counted(islice(checked, len(run)), report), expected=expected
                    ),
                )
        finish_shards(artifact)
        kept, rejected = sum(unit["samples"] for unit in artifact.units.values()), artifact.facts["rejected"]
        more = f"; {rejected} could not be decoded: see {out / 'rejects.jsonl'}" if rejected else ""
        report.log(f"wrote {kept} images{more}")
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


def counted(images: Iterator[Checked], report: Report) -> Iterator[Checked]:
    """The images, with progress shown as they are used."""
    for image in images:
        yield image
        report.advance()


def write_run(
    root: Path, name: str, run: list[Entry], *, images: Iterator[Checked], expected: dict[str, FileEntry] | None = None
) -> TarUnit:
    """Write the tar of a run's images that can be decoded, and its index; return the manifest's entry.

    Args:
        expected: the files of the same tar as they were made before, if it was.

    Raises:
        MismatchError: they come out otherwise now.
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
                f"the images of tar {name} are no longer those that it was made from",
                where=root / tar,
                fix="restore the source as it was, or make the shard set again in a new folder",
            )
        return {"files": stage.commit(*pieces), "samples": len(checksums), "rejected": rejected}


def finish_shards(artifact: ShardsArtifact) -> None:
    """Write ``rejects.jsonl`` and the manifest, where they are not as they should be.

    Raises:
        SourceError: not one image could be decoded.
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
    """The images that could not be decoded, tar after tar as the manifest has them."""
    return [reject for unit in artifact.units.values() if "rejected" in unit for reject in unit["rejected"]]


def refuse_empty(artifact: ShardsArtifact) -> None:
    """Raise SourceError where every image of the source was rejected."""
    if any(unit["samples"] for unit in artifact.units.values()):
        return
    reasons = [reject["reason"] for reject in rejected_images(artifact)]
    raise SourceError(
        f"none of the {len(reasons)} files can be decoded; one of them: {reasons[0]}",
        where=artifact.root / "rejects.jsonl",
        fix="check the source: its files bear image names and are not images",
    )


def refuse_inside(source: Path, out: Path) -> None:
    """Raise SourceError where the folder to make lies inside the source."""
    if is_local(out) and is_local(source) and out.resolve().is_relative_to(source.resolve()):
        raise SourceError(
            "the output folder lies inside the source, and would be taken for a class of it",
            where=out,
            fix="give an output folder elsewhere",
        )
