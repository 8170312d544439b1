"""A folder of images to a shard set.

The order is one permutation of the whole source, cut into runs of ``samples`` files, one tar a run. Every image is
decoded once to prove that it can be; what cannot is left out of its tar and listed in ``rejects.jsonl``, so a tar may
hold fewer. A tar thus depends on the source and the settings alone: not on workers, nor on where a run was broken off.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import remove_debris, replacing, write_bytes
from cae2pipe.artifacts.box import Box, check_file, open_or_create
from cae2pipe.artifacts.digest import file_entry, fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import identity
from cae2pipe.config.extract import ShardSettings
from cae2pipe.errors import ImageError, SourceError
from cae2pipe.images.decode import decode_rgb
from cae2pipe.keyed import keyed_permutation
from cae2pipe.progress import Report
from cae2pipe.shards.shard_set import KIND, REJECTS, ShardSet
from cae2pipe.shards.source import Entry, Source, find_splits, scan
from cae2pipe.shards.tar import write_samples

Check = Callable[[Sequence[Path]], Iterable[str | None]]


def build_all(source: Path, out: Path, settings: ShardSettings, report: Report) -> list[ShardSet]:
    """One shard set in ``out``, or one in ``out``/SPLIT for each split of a source ``split/class/*.jpg``."""
    splits = find_splits(source) if source.is_dir() else []
    if not splits:
        return [build_shard_set(source, out, settings, report)]
    return [build_shard_set(source / split, out / split, settings, report) for split in splits]


def build_shard_set(source: Path, out: Path, settings: ShardSettings, report: Report) -> ShardSet:
    """Make, or go on making, the shard set ``out`` from a folder of images.

    Raises:
        SourceError: the source cannot be used. MismatchError: ``out`` was made from other images or settings.
        LockedError: another process writes ``out``.
    """
    found = scan(source)
    with writing(out):
        remove_debris(out)
        box = open_or_create(
            out,
            KIND,
            {"settings": identity(settings), "classes": found.classes, "source": source_identity(found)},
            facts={"rejected": 0},
            fix="give another output folder, or the source and settings this one was made from",
        )
        runs = plan_runs(found, settings)
        missing = {name: run for name, run in runs.items() if not is_whole(box, name)}
        if not missing and is_whole(box, REJECTS) and box.complete:
            report.log(f"nothing to do: {out} holds all {len(found.entries)} images of {source}")
            return ShardSet.open(out)
        report.total(len(found.entries), "images", done=len(found.entries) - sum(map(len, missing.values())))
        with checking(settings.speed.workers) as check:
            for name, run in missing.items():
                box.add(name, write_run(box.root, name, found, run, check))
                report.advance(len(run))
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


def is_whole(box: Box, name: str) -> bool:
    """Whether a unit is there with its files' sizes. Changed bytes are `cae2pipe verify`'s to find."""
    unit = box.units.get(name)
    return unit is not None and not any(
        check_file(box.root / path, entry, digests=False) for path, entry in unit["files"].items()
    )


def write_run(root: Path, name: str, source: Source, run: list[Entry], check: Check) -> dict[str, Any]:
    """Check a run's images and write its tar; return the manifest's entry, with what was rejected."""
    reasons = check([source.root / entry.path for entry in run])
    rejected = [{"path": e.path, "reason": why} for e, why in zip(run, reasons, strict=True) if why is not None]
    refused = {reject["path"] for reject in rejected}
    kept = [entry for entry in run if entry.path not in refused]
    tar = root / "tars" / f"{name}.tar"
    with replacing(tar) as temporary:
        write_samples(temporary, ((e.key, e.label, (source.root / e.path).read_bytes()) for e in kept))
    files = {tar.relative_to(root).as_posix(): file_entry(tar)}
    return {"files": files, "samples": len(kept), "rejected": rejected}


def finish(box: Box, report: Report) -> None:
    """Write ``rejects.jsonl`` and the manifest.

    Raises:
        SourceError: not one image could be decoded.
    """
    rejects = [reject for name, unit in box.units.items() if name != REJECTS for reject in unit["rejected"]]
    rejects.sort(key=lambda reject: reject["path"])
    path = box.root / "rejects.jsonl"
    write_bytes(path, "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode())
    box.facts["rejected"] = len(rejects)
    box.add(REJECTS, {"files": {path.name: file_entry(path)}, "samples": 0})
    kept = sum(unit["samples"] for unit in box.units.values())
    box.save(complete=True)
    if not kept:
        raise SourceError(
            f"none of the {len(rejects)} files can be decoded; the first: {rejects[0]['reason']}",
            where=path,
            fix="check the source: its files bear image names and are not images",
        )
    report.log(f"wrote {kept} images" + (f"; {len(rejects)} could not be decoded: see {path}" if rejects else ""))


def check_image(path: Path) -> str | None:
    """Why an image cannot be decoded, or None."""
    try:
        decode_rgb(path.read_bytes(), where=path)
    except ImageError as error:
        return error.what
    except OSError as error:
        return f"this file cannot be read: {error.strerror}"
    return None


@contextmanager
def checking(workers: int) -> Iterator[Check]:
    """``check_image`` over many paths, in worker processes (-1: one a core; 0: none)."""
    workers = (os.cpu_count() or 1) if workers < 0 else workers
    if workers == 0:
        yield lambda paths: list(map(check_image, paths))
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)
    try:
        yield lambda paths: list(pool.map(check_image, paths, chunksize=16))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group: the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
