"""A folder of images to a shard set.

The order is one permutation of the whole source, cut into runs of ``samples`` files, one tar a run. Every image is
decoded once to prove that it can be; what cannot is left out of its tar and listed in ``rejects.jsonl``, so a tar may
hold fewer. A tar thus depends on the source and the settings alone: not on workers, nor on where a run was broken off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import remove_debris, write_bytes
from cae2pipe.artifacts.box import Box, open_or_create
from cae2pipe.artifacts.digest import file_entry, fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.places import file_size, is_local, read_bytes
from cae2pipe.artifacts.staging import staged
from cae2pipe.config.base import identity
from cae2pipe.config.extract import ShardSettings
from cae2pipe.errors import SourceError
from cae2pipe.keyed import keyed_permutation
from cae2pipe.progress import Report
from cae2pipe.shards.checking import CHUNK, Check, checking, read_file
from cae2pipe.shards.shard_set import KIND, REJECTS, ShardSet
from cae2pipe.shards.source import Entry, Source, find_splits, scan
from cae2pipe.shards.tar import write_samples


def build_all(source: Path, out: Path, settings: ShardSettings, report: Report) -> list[ShardSet]:
    """One shard set in ``out``, or one in ``out``/SPLIT for each split of a source ``split/class/*.jpg``.

    Raises:
        As ``build_shard_set``. Every split is scanned before the first is packed.
    """
    splits = find_splits(source)
    if not splits:
        return [build_shard_set(source, out, settings, report)]
    _refuse_inside(source, out)
    found = {split: scan(source / split) for split in splits}
    return [pack(images, out / split, settings, report) for split, images in found.items()]


def build_shard_set(source: Path, out: Path, settings: ShardSettings, report: Report) -> ShardSet:
    """Make, or go on making, the shard set ``out`` from a folder of images.

    Raises:
        SourceError: the source cannot be used, or no image of it decoded. MismatchError: ``out`` was made from other
            images or settings. ManifestError: ``out`` holds something else. LockedError: another process writes it.
    """
    found = scan(source)
    _refuse_inside(source, out)
    return pack(found, out, settings, report)


def pack(source: Source, out: Path, settings: ShardSettings, report: Report) -> ShardSet:
    """``build_shard_set`` of a scanned source."""
    with writing(out):
        box = open_or_create(
            out,
            KIND,
            {"settings": identity(settings), "classes": source.classes, "source": source_identity(source)},
            facts={"rejected": 0},
            fix="give another output folder, or the source and settings this one was made from",
        )
        if is_local(out):
            remove_debris(out)
        runs = plan_runs(source, settings)
        missing = {name: run for name, run in runs.items() if not box.has(name)}
        total = len(source.entries)
        if not missing and box.has(REJECTS) and box.complete:
            refuse_empty(box)
            report.log(f"nothing to do: {out} holds all {total - box.facts['rejected']} images of {source.root}")
            return ShardSet.open(out)
        report.total(total, "images", done=total - sum(map(len, missing.values())))
        with checking(settings.speed.workers) as check:
            for name, run, reasons in checked_ahead(source.root, missing, check):
                box.add(name, write_run(box.root, name, source.root, run, counted(reasons, report)))
        finish(box, report)
        return ShardSet.open(out)


def source_identity(source: Source) -> dict[str, Any]:
    """What a source is taken to be: its number of images, and a digest of their paths and sizes."""
    return {
        "images": len(source.entries),
        "listing": fingerprint([[entry.path, entry.bytes] for entry in source.entries]),
    }


def plan_runs(source: Source, settings: ShardSettings) -> dict[str, list[Entry]]:
    """The files of every tar, by its name."""
    order = keyed_permutation(len(source.entries), "shard", settings.seed)
    shuffled = [source.entries[index] for index in order]
    starts = range(0, len(shuffled), settings.samples)
    return {f"{number:06d}": shuffled[low : low + settings.samples] for number, low in enumerate(starts)}


def checked_ahead(
    root: Path, runs: Mapping[str, list[Entry]], check: Check
) -> Iterator[tuple[str, list[Entry], Iterator[str | None]]]:
    """Every run with its images' checks, begun one run ahead: workers decode while the main process writes."""
    begun = ((name, run, check([root / entry.path for entry in run])) for name, run in runs.items())
    for current, _ in pairwise(chain(begun, [None])):
        assert current is not None
        yield current


def counted(reasons: Iterator[str | None], report: Report) -> list[str | None]:
    """All reasons, with progress shown as they come."""
    done: list[str | None] = []
    for reason in reasons:
        done.append(reason)
        if len(done) % CHUNK == 0:
            report.advance(CHUNK)
    if len(done) % CHUNK:
        report.advance(len(done) % CHUNK)
    return done


def write_run(root: Path, name: str, source: Path, run: list[Entry], reasons: list[str | None]) -> dict[str, Any]:
    """Write the tar of a run's images that can be decoded; return the manifest's entry, with what was rejected."""
    rejected = [{"path": e.path, "reason": why} for e, why in zip(run, reasons, strict=True) if why is not None]
    kept = [entry for entry, why in zip(run, reasons, strict=True) if why is None]
    if not kept:  # WebDataset refuses empty tars
        return {"files": {}, "samples": 0, "rejected": rejected}
    tar = f"tars/{name}.tar"
    with staged(root, tar) as stage:
        write_samples(stage.path(tar), ((e.key, e.label, _read_unchanged(source, e)) for e in kept))
        return {"files": stage.commit(tar), "samples": len(kept), "rejected": rejected}


def finish(box: Box, report: Report) -> None:
    """Write ``rejects.jsonl`` and the manifest.

    Raises:
        SourceError: not one image could be decoded.
    """
    rejects = [reject for name, unit in box.units.items() if name != REJECTS for reject in unit["rejected"]]
    rejects.sort(key=lambda reject: reject["path"])
    path = box.root / "rejects.jsonl"
    data = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode()
    if file_size(path) is None or read_bytes(path) != data:
        write_bytes(path, data)
    box.facts["rejected"] = len(rejects)
    box.add(REJECTS, {"files": {path.name: file_entry(path)}, "samples": 0})
    box.save(complete=True)
    refuse_empty(box)
    kept = sum(unit["samples"] for unit in box.units.values())
    report.log(f"wrote {kept} images" + (f"; {len(rejects)} could not be decoded: see {path}" if rejects else ""))


def refuse_empty(box: Box) -> None:
    """Raise SourceError where every image of the source was rejected."""
    if any(unit["samples"] for unit in box.units.values()):
        return
    reasons = [reject["reason"] for name, unit in box.units.items() if name != REJECTS for reject in unit["rejected"]]
    raise SourceError(
        f"none of the {len(reasons)} files can be decoded; one of them: {reasons[0]}",
        where=box.root / "rejects.jsonl",
        fix="check the source: its files bear image names and are not images",
    )


def _refuse_inside(source: Path, out: Path) -> None:
    if is_local(out) and out.resolve().is_relative_to(source.resolve()):
        raise SourceError(
            "the output folder lies inside the source, and would be taken for a class of it",
            where=out,
            fix="give an output folder elsewhere",
        )


def _read_unchanged(source: Path, entry: Entry) -> bytes:
    data = read_file(source / entry.path)
    if len(data) != entry.bytes:
        raise SourceError(
            f"this file has changed while it was packed: {len(data)} bytes instead of {entry.bytes}",
            where=source / entry.path,
            fix="leave the source alone while it is packed, and give a new output folder",
        )
    return data
