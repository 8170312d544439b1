"""Shard: pack the original files of images into shuffled WebDataset tars; each image is checked by decoding it.

Read from top to bottom: find the splits, scan each and compare it with the reference, pack them one by one.
"""

from __future__ import annotations

from pathlib import Path

from cae2pipe.config.extract import ShardSettings
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.build import pack, refuse_inside
from cae2pipe.shards.expected import check_expected
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.shards.source import find_splits, scan


def shard_images(
    source: Path,
    out: Path,
    settings: ShardSettings,
    *,
    report: Report,
    labels: Path | None = None,
    expected: str | None = None,
) -> list[ShardSet]:
    """Make one shard set in ``out``, or one in ``out``/SPLIT for each split of a source ``split/class/*.jpg``.

    Args:
        labels: ground truth of images without classes; with several splits, of those without classes.
        expected: a reference manifest that the source must match (``cae2pipe/shards/expected.py``).

    Raises:
        SourceError, MismatchError, ManifestError, LockedError: as ``build_shard_set``. Every split is scanned before
            the first is packed.
    """
    report.phase("listing the images")
    splits = find_splits(source)
    refuse_inside(source, out)
    if splits:
        report.log(f"{source} contains {', '.join(splits)}: making a shard set of each")
    scanned = {}
    for split, folder in splits.items():
        scanned[split] = scan(folder, labels if split.lower().startswith("val") else None)
    for split, images in scanned.items():
        if expected is not None:
            check_expected(images, expected, split)
    if splits:
        return [pack(images, out / split, settings, report=report) for split, images in scanned.items()]
    images = scan(source, labels)
    if expected is not None:
        check_expected(images, expected)
    return [pack(images, out, settings, report=report)]
