"""Stage 3: score an encoder on labelled images.

Read from top to bottom: open the data, load the encoder, compute features once, score, write ``result.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cae2pipe.artifacts.atomic import write_json
from cae2pipe.artifacts.box import Box, check_file, open_or_create
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import identity
from cae2pipe.config.evaluate import KnnSettings, LinearSettings
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.datasets import common_labels, open_data
from cae2pipe.evaluation.encoders import label, load_encoder
from cae2pipe.evaluation.features import extract_features, resolve_feature, resolve_size
from cae2pipe.evaluation.knn import knn_accuracy
from cae2pipe.evaluation.linear import train_probe
from cae2pipe.progress import Report
from cae2pipe.training.device import pick_device

RESULT = "result.json"

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Train features and labels, val features and labels, on the device."""
Score = Callable[[dict[str, Tensors], str, int], dict[str, Any]]
"""From the tensors by kind of feature, the kind asked for and the number of classes to what is scored."""


def evaluate_knn(encoder: str, data: Path, out: Path, settings: KnnSettings, report: Report) -> dict[str, Any]:
    """Weighted nearest neighbours of ``data``'s val images among its train images, into ``out``/knn.

    Returns:
        What ``result.json`` holds; ``top1`` is the accuracy at the first k; ``by_feature`` has every k of the class
        token's and of the mean patch's.

    Raises:
        SourceError, SettingsError, ManifestError, TeacherError, MismatchError, DamageError: see their messages.
    """

    def score(by_kind: dict[str, Tensors], feature: str, classes: int) -> dict[str, Any]:
        numbers = neighbours(settings, len(by_kind[feature][0]), report)
        found = {
            kind: knn_accuracy(*tensors, classes=classes, k=numbers, temperature=settings.temperature)
            for kind, tensors in by_kind.items()
        }
        by_feature = {kind: {str(k): value for k, value in scores.items()} for kind, scores in found.items()}
        return {**found[feature][settings.k[0]], "k": settings.k[0], "by_feature": by_feature}

    return evaluate("knn", encoder, data, out, settings, score, report)


def evaluate_linear(encoder: str, data: Path, out: Path, settings: LinearSettings, report: Report) -> dict[str, Any]:
    """A linear classifier trained on ``data``'s train features and scored on its val ones, into ``out``/linear.

    Returns:
        What ``result.json`` holds; ``top1`` is the accuracy.

    Raises:
        As ``evaluate_knn``.
    """

    def score(by_kind: dict[str, Tensors], feature: str, classes: int) -> dict[str, Any]:
        return train_probe(*by_kind[feature], classes=classes, settings=settings, report=report)

    return evaluate("linear", encoder, data, out, settings, score, report)


def evaluate(
    kind: str,
    spec: str,
    data: Path,
    out: Path,
    settings: KnnSettings | LinearSettings,
    score: Score,
    report: Report,
) -> dict[str, Any]:
    """What all evaluations on frozen features share: features of both splits, a score, a box with the result."""
    train_split, val_split = open_data(data, settings.speed.batch)
    device = pick_device(settings.speed.device)
    encoder = load_encoder(spec, settings.seed, device)
    feature, size = resolve_feature(settings.features, encoder), resolve_size(settings.features, encoder)
    root = out / kind
    with writing(out):
        box = open_or_create(
            root,
            "scores",
            {
                "evaluation": kind,
                "settings": identity(settings),
                "encoder": encoder.identity,
                "feature": feature,
                "image_size": size,
                "data": {"train": train_split.identity, "val": val_split.identity},
            },
            facts={},
            fix="give another output folder",
        )
        if result := finished(box):
            report.log(f"nothing to do: {root} holds this score, top1 {result['top1']:.4f}")
            return result
        parts = []
        for split in (train_split, val_split):
            parts.append(
                extract_features(out / "features", encoder, split, settings.features, settings.speed, device, report)
            )
        train, val = parts
        val_labels = common_labels(val.labels, val_split.classes, train_split.classes)
        labels = train.labels.to(device), val_labels.to(device)
        tensors = {
            kind: (train.features[kind].to(device), labels[0], val.features[kind].to(device), labels[1])
            for kind in train.features
        }
        result = {
            "evaluation": kind,
            "encoder": label(spec),
            "feature": feature,
            **score(tensors, feature, len(train_split.classes)),
            "protocol": protocol(settings, size),
            "classes": len(train_split.classes),
            "images": {"train": len(train.labels), "val": len(val.labels)},
            "rejected": {"train": len(train.rejected), "val": len(val.rejected)},
        }
        write_json(root / RESULT, result)
        box.facts["result"] = {name: value for name, value in result.items() if name != "losses"}
        box.add("result", {"files": {RESULT: file_entry(root / RESULT)}})
        box.save(complete=True)
        return result


def neighbours(settings: KnnSettings, images: int, report: Report) -> tuple[int, ...]:
    """The numbers of neighbours that a training set has; the others are named in the log.

    Raises:
        SettingsError: the first one, which gives the headline, is not among them.
    """
    fitting = tuple(k for k in settings.k if k <= images)
    if settings.k[0] > images:
        raise SettingsError(
            f"{settings.k[0]} neighbours are asked for, and there are {images} training images",
            where="k",
            fix=f"--set 'k={list(fitting) or [max(1, images // 2)]}'",
        )
    if len(fitting) < len(settings.k):
        report.log(f"left out k above the {images} training images: {sorted(set(settings.k) - set(fitting))}")
    return fitting


def protocol(settings: KnnSettings | LinearSettings, size: int) -> str:
    """How a score was taken, in a line: without it the number says little."""
    crop = f"crop {size} of {round(size / settings.features.crop)}"
    if isinstance(settings, KnnSettings):
        return f"k {settings.k[0]}, temperature {settings.temperature:g}, {crop}"
    rate = f"the best of {len(settings.sweep)} on held-out training images" if settings.sweep else f"{settings.lr:g}"
    return (
        f"LARS, lr {rate} x batch / 256, batch {settings.batch}, {settings.epochs} epochs, features of one "
        f"central {crop}"
    )


def finished(box: Box) -> dict[str, Any] | None:
    """The result that a box already holds, if its file is as it was written."""
    if "result" not in box.units:
        return None
    entry = box.units["result"]["files"][RESULT]
    if check_file(box.root / RESULT, entry):
        return None
    return json.loads((box.root / RESULT).read_text(encoding="utf-8"))


RUNS: dict[str, Callable[[str, Path, Path, Any, Report], dict[str, Any]]] = {
    "knn": evaluate_knn,
    "linear": evaluate_linear,
}
"""Evaluations by name."""
