"""Features of a split, computed once and kept in parts: a broken-off run goes on, and the next score reuses them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import remove_debris, replacing
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.config.evaluate import EvaluateSpeed, FeatureSettings
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.evaluation.datasets import CropReader, Split
from cae2pipe.evaluation.encoders import FrozenEncoder
from cae2pipe.loading.workers import in_order
from cae2pipe.processes import worker_count
from cae2pipe.progress import Report

PART = 8192
"""Images a part, about."""


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, D) float32 by kind (``class``, where there is a class token, and ``mean``) and labels (N,) int64 of
    what could be decoded; ``rejected`` lists the rest."""

    features: dict[str, Tensor]
    labels: Tensor
    rejected: list[dict[str, Any]]


def resolve_feature(settings: FeatureSettings, encoder: FrozenEncoder) -> str:
    """``class`` or ``mean``.

    Raises:
        SettingsError: a class token is asked for and there is none.
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
        SettingsError: the encoder takes images of its own size alone.
    """
    size = settings.image_size or encoder.image_size
    if size != encoder.image_size and not encoder.resizes:
        raise SettingsError(
            f"this encoder takes {encoder.image_size} pixels, and crops of {size} are asked for",
            where="features.image_size",
            fix=f"leave it away, or --set features.image_size={encoder.image_size}",
        )
    return size


def extract_features(
    folder: Path,
    encoder: FrozenEncoder,
    split: Split,
    settings: FeatureSettings,
    speed: EvaluateSpeed,
    device: torch.device,
    report: Report,
) -> FeatureSet:
    """The features of a split, from ``folder`` where an earlier run left them.

    Raises:
        SourceError: not one image can be decoded, a file cannot be read, or features are not finite.
        DamageError: a shard has changed.
    """
    size = resolve_size(settings, encoder)
    key = fingerprint([encoder.identity, split.identity, size, settings.crop])[:16]
    per_part = max(1, PART // max(1, speed.batch))
    parts = [range(low, min(low + per_part, len(split.runs))) for low in range(0, len(split.runs), per_part)]
    # Runs hang on the batch: parts of another batch are other parts.
    paths = [folder / f"{key}-{speed.batch}-{number:05d}.safetensors" for number in range(len(parts))]
    folder.mkdir(parents=True, exist_ok=True)
    remove_debris(folder)
    for path in paths:
        if path.exists() and not is_readable(path):
            report.log(f"{path} is damaged: made again")
            path.unlink()
    done = sum(len(part) for part, path in zip(parts, paths, strict=True) if path.exists())
    report.total(len(split.runs), f"batches of {split.root.name}", done=done)
    for part, path in zip(parts, paths, strict=True):
        if not path.exists():
            write_part(path, encoder, split, part, size, round(size / settings.crop), speed, device, report)
    found = [read_part(path) for path in paths]
    # A part without a single image does not know how wide features are.
    filled = [part.features for part in found if len(part.labels)]
    whole = FeatureSet(
        {kind: torch.cat([features[kind] for features in filled]) for kind in (filled[0] if filled else ())},
        torch.cat([part.labels for part in found]),
        [reject for part in found for reject in part.rejected],
    )
    for reject in whole.rejected[:10]:
        report.log(f"left out: {split.root / reject['path']}: {reject['reason']}")
    if len(whole.rejected) > 10:
        report.log(f"left out {len(whole.rejected) - 10} more images that cannot be decoded")
    if not len(whole.labels):
        raise SourceError("not one image here can be decoded", where=split.root, fix="check the folder")
    return whole


def write_part(
    path: Path,
    encoder: FrozenEncoder,
    split: Split,
    runs: range,
    size: int,
    resize: int,
    speed: EvaluateSpeed,
    device: torch.device,
    report: Report,
) -> None:
    from safetensors.torch import save_file

    reader = CropReader(split, runs, size, resize)
    workers = min(worker_count(speed.workers), len(reader))
    features: dict[str, list[Tensor]] = {"class": [], "mean": []}
    labels, rejected = [], []
    for crops in in_order(reader, workers):
        if len(crops.labels):
            pixels = torch.from_numpy(crops.pixels).permute(0, 3, 1, 2).to(device)
            found = encoder(pixels)
            features["mean"].append(found.mean.cpu())
            if found.class_token is not None:
                features["class"].append(found.class_token.cpu())
            if not all(torch.isfinite(parts[-1]).all() for parts in features.values() if parts):
                raise SourceError(
                    "the encoder's features are not finite: a score would mean nothing",
                    where=split.root,
                    fix="check the encoder's weights; on CUDA, try --device cpu, which computes in fp32",
                )
            labels.append(torch.from_numpy(crops.labels))
        rejected += crops.rejected
        report.advance(1)
    tensors = {
        **{kind: torch.cat(parts) for kind, parts in features.items() if parts},
        "labels": torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"rejected": json.dumps(rejected)})


def is_readable(path: Path) -> bool:
    """Whether a part is a whole file. Its header says how long it must be, so this reads little."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "labels" in file.keys()  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError):
        return False


def read_part(path: Path) -> FeatureSet:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rejected = json.loads((file.metadata() or {}).get("rejected", "[]"))
        features = {name: file.get_tensor(name) for name in sorted(file.keys()) if name != "labels"}
        return FeatureSet(features, file.get_tensor("labels"), rejected)
