"""Features of a split, computed once and stored in parts: interrupted runs resume, and later scores reuse them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.digest import canonical_json, fingerprint
from cae2pipe.artifacts.json_files import parse_json
from cae2pipe.artifacts.tensors import write_safetensors
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.evaluate import FeatureSettings
from cae2pipe.errors import DamageError, SettingsError, SourceError
from cae2pipe.evaluation.crop_batches import crop_batches
from cae2pipe.evaluation.crops import CentralCrop, Crop, DrawnCrop
from cae2pipe.evaluation.datasets import Split
from cae2pipe.evaluation.encoders import FrozenEncoder
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.world import World
from cae2pipe.supervised.remedies import batch_remedy

PART = 8192
"""Approximate number of images per part."""


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, D) float32 by kind (``class``, if there is a class token, and ``mean``), labels (N,) int64 and keys
    of the decoded images; ``rejected`` lists the others."""

    features: dict[str, Tensor]
    labels: Tensor
    keys: list[str]
    rejected: list[dict[str, Any]]


def resolve_feature(settings: FeatureSettings, encoder: FrozenEncoder) -> str:
    """``class`` or ``mean``.

    Raises:
        SettingsError: the class token is requested and there is none.
    """
    if settings.feature == "class" and not encoder.has_class_token:
        raise SettingsError(
            "this encoder has no class token", where="features.feature", fix="--set features.feature=mean"
        )
    if settings.feature == "auto":
        return "class" if encoder.trained_class_token else "mean"
    return settings.feature


def resolve_size(settings: FeatureSettings, encoder: FrozenEncoder) -> int:
    """Side of the crop in pixels.

    Raises:
        SettingsError: the encoder only takes images of its own size.
    """
    size = settings.image_size or encoder.image_size
    if size != encoder.image_size and not encoder.resizes:
        raise SettingsError(
            f"image size mismatch: encoder {encoder.image_size} pixels, features.image_size {size}",
            where="features.image_size",
            fix=f"omit it, or --set features.image_size={encoder.image_size}",
        )
    return size


def extract_features(
    folder: Path,
    encoder: FrozenEncoder,
    split: Split,
    *,
    crop: Crop,
    workers: int,
    world: World,
    report: Report,
) -> FeatureSet | None:
    """The features of a split's crops; parts that exist in ``folder`` are reused.

    The parts are divided among the processes; only the leading one gets the result, the others None.

    Raises:
        SourceError: no image can be decoded, a file cannot be read, or features are not finite.
        DamageError: a shard has changed. OutOfMemoryError: a batch does not fit the device.
    """
    # A folder's identity consists of names and sizes, which may be the same in train and val.
    key = fingerprint([encoder.identity, split.root.name, split.identity, description(crop)])[:16]
    per_part = max(1, PART // split.batch)
    parts = [range(low, min(low + per_part, len(split.runs))) for low in range(0, len(split.runs), per_part)]
    # Runs depend on the batch size, and so do the parts.
    paths = [folder / f"{key}-{split.batch}-{number:05d}.safetensors" for number in range(len(parts))]
    world.run_on_main(lambda: clear(folder, paths, report))
    own = [(part, path) for part, path in zip(parts, paths, strict=True)][world.rank :: world.ranks]
    done = sum(len(part) for part, path in own if path.exists())
    report.phase(f"computing features of {split.root.name}")
    report.total(sum(len(part) for part, _ in own), "batches", done=done)
    for part, path in own:
        if not path.exists():
            with memory_advice(f"a pass over {split.batch} images", batch_remedy(split.batch), split.root):
                write_part(
                    path, encoder, split, runs=part, crop=crop, workers=workers, device=world.device, report=report
                )
    world.barrier()
    return gathered(split, paths, report) if world.is_main else None


def description(crop: Crop) -> dict[str, Any]:
    """The properties of a crop that features depend on, as plain values."""
    if isinstance(crop, CentralCrop):
        return {"size": crop.size, "resize": crop.resize}
    assert isinstance(crop, DrawnCrop)
    return {"size": crop.size, "draw": fingerprinted(crop.settings), "seed": crop.seed, "number": crop.epoch}


def clear(folder: Path, paths: list[Path], report: Report) -> None:
    """Make the folder, and remove leftovers of a killed run and unreadable parts from it."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_debris(folder)
    for path in paths:
        if not path.exists():
            continue
        try:
            read_part(path)
        except DamageError as error:
            report.log(f"{path} is damaged, or from an older version ({error.what}): computing it again")
            path.unlink()


def gathered(split: Split, paths: list[Path], report: Report) -> FeatureSet:
    """The parts as one set."""
    parts = [read_part(path) for path in paths]
    # A part without images does not know the width of features.
    filled = [part.features for part in parts if len(part.labels)]
    whole = FeatureSet(
        {kind: torch.cat([features[kind] for features in filled]) for kind in (filled[0] if filled else ())},
        torch.cat([part.labels for part in parts]),
        [key for part in parts for key in part.keys],
        [reject for part in parts for reject in part.rejected],
    )
    log_rejects(split, whole.rejected, report)
    if not len(whole.labels):
        raise SourceError("no image here can be decoded", where=split.root, fix="check the folder")
    return whole


def log_rejects(split: Split, rejected: list[dict[str, Any]], report: Report) -> None:
    """Log the images that could not be decoded."""
    for reject in rejected[:10]:
        report.log(f"skipped {split.root / reject['path']}: {reject['reason']}")
    if len(rejected) > 10:
        report.log(f"skipped {len(rejected) - 10} more images that cannot be decoded")


def write_part(
    path: Path,
    encoder: FrozenEncoder,
    split: Split,
    *,
    runs: range,
    crop: Crop,
    workers: int,
    device: torch.device,
    report: Report,
) -> None:
    """Compute and write a part. Features are copied to the host at the end, so the device never waits for it."""
    features: dict[str, list[Tensor]] = {"class": [], "mean": []}
    labels, keys, rejected = [], [], []
    for batch in crop_batches(split, runs, crop, workers=workers, device=device):
        crops = batch.crops
        if len(crops.labels):
            encoded = encoder(batch.pixels)
            features["mean"].append(encoded.mean)
            if encoded.class_token is not None:
                # A copy: a view would keep all tokens in memory.
                features["class"].append(encoded.class_token.clone())
            labels.append(torch.from_numpy(crops.labels))
        keys += crops.keys
        rejected += crops.rejected
        report.advance(1)
    tensors = {kind: torch.cat(parts).cpu() for kind, parts in features.items() if parts}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise SourceError(
            "the encoder's features are not finite",
            where=split.root,
            fix="check the encoder's weights; on CUDA, try --device cpu, which computes in fp32",
        )
    known = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)
    samples = {"keys": keys, "rejected": rejected}
    # A single entry, since safetensors writes several in any order.
    about = {"samples": json.dumps({**samples, "crc32c": checksum(tensors, known, samples)})}
    write_safetensors(path, {**tensors, "labels": known}, about)


def checksum(features: dict[str, Tensor], labels: Tensor, samples: dict[str, Any]) -> int:
    """CRC-32C over a part: names, types, shapes and bytes of its tensors, and its entries about samples."""
    crc: int = google_crc32c.value(canonical_json(samples).encode())
    for name, tensor in [*sorted(features.items()), ("labels", labels)]:
        crc = google_crc32c.extend(crc, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        crc = google_crc32c.extend(crc, tensor.numpy().tobytes())
    return crc


def read_part(path: Path) -> FeatureSet:
    """A part as it was written.

    Raises:
        DamageError: it has changed, is incomplete, or was written by a version without checksums.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DamageError("not a regular file", where=path)
    try:
        with safe_open(path, "pt") as file:
            samples = parse_json((file.metadata() or {})["samples"], path, fix="delete it", error=DamageError)
            features = {name: file.get_tensor(name) for name in sorted(file.keys())}
        labels, written = features.pop("labels"), samples.pop("crc32c")
        if checksum(features, labels, samples) != written:
            raise DamageError("the checksum does not match", where=path)
        return FeatureSet(features, labels, samples["keys"], samples["rejected"])
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reraise_exhaustion(error)
        raise DamageError(f"{type(error).__name__}: {error}", where=path) from None
