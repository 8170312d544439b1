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
    """Features (N, D) float32 and labels (N,) int64 of what could be decoded; ``rejected`` lists the rest."""

    features: Tensor
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
    kind = resolve_feature(settings, encoder)
    size = resolve_size(settings, encoder)
    key = fingerprint([encoder.identity, split.identity, kind, size, settings.crop])[:16]
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
            write_part(path, encoder, split, part, kind, size, round(size / settings.crop), speed, device, report)
    found = [read_part(path) for path in paths]
    whole = FeatureSet(
        # A part without a single image does not know how wide features are.
        torch.cat([part.features for part in found if len(part.labels)] or [torch.zeros(0, 0)]),
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
    kind: str,
    size: int,
    resize: int,
    speed: EvaluateSpeed,
    device: torch.device,
    report: Report,
) -> None:
    from safetensors.torch import save_file

    reader = CropReader(split, runs, size, resize)
    workers = min(worker_count(speed.workers), len(reader))
    features, labels, rejected = [], [], []
    for crops in in_order(reader, workers):
        if len(crops.labels):
            pixels = torch.from_numpy(crops.pixels).permute(0, 3, 1, 2).to(device)
            found = encoder(pixels)
            features.append((found.mean if kind == "mean" else _required(found.class_token)).cpu())
            if not torch.isfinite(features[-1]).all():
                raise SourceError(
                    "the encoder's features are not finite: a score would mean nothing",
                    where=split.root,
                    fix="check the encoder's weights; on CUDA, try --device cpu, which computes in fp32",
                )
            labels.append(torch.from_numpy(crops.labels))
        rejected += crops.rejected
        report.advance(1)
    tensors = {
        "features": torch.cat(features) if features else torch.zeros(0, 0),
        "labels": torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"rejected": json.dumps(rejected)})


def is_readable(path: Path) -> bool:
    """Whether a part is a whole file. Its header says how long it must be, so this reads little."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {"features", "labels"} <= set(file.keys())
    except (SafetensorError, OSError):
        return False


def read_part(path: Path) -> FeatureSet:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rejected = json.loads((file.metadata() or {}).get("rejected", "[]"))
        return FeatureSet(file.get_tensor("features"), file.get_tensor("labels"), rejected)


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
