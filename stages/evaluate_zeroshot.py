"""Stage 3, zero-shot: classify images by the nearest class embedding in the teacher's space.

Read from top to bottom: open the data, load the encoder with its head, read or compute class embeddings, compute
features, write ``result.json`` and predictions. Nothing is trained. Under torchrun the processes share the images; the
leading one embeds the classes and writes.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.evaluate import ZeroshotSettings
from cae2pipe.evaluation.crop_batches import batch_for
from cae2pipe.evaluation.crops import CentralCrop
from cae2pipe.evaluation.datasets import open_val
from cae2pipe.evaluation.encoders import display_name
from cae2pipe.evaluation.features import extract_features, log_rejects, resolve_size
from cae2pipe.evaluation.result_store import open_scores, save_result
from cae2pipe.evaluation.scores import accuracy, per_class, write_predictions
from cae2pipe.evaluation.zeroshot import zeroshot_predictions
from cae2pipe.evaluation.zeroshot_classes import ClassSource, class_source, refuse_other_width, write_classes
from cae2pipe.evaluation.zeroshot_encoders import load_aligned
from cae2pipe.runtime.device import resolve_precision, set_backends
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.world import stage_world

KIND, CLASSES = "zeroshot", "classes.safetensors"


def evaluate_zeroshot(
    spec: str, data: Path, *, out: Path, settings: ZeroshotSettings, report: Report
) -> dict[str, Any]:
    """Score the encoder ``spec`` on the val images of ``data``, into ``out``/zeroshot.

    Returns:
        The content of ``result.json``; ``top1`` and ``top5`` are the accuracies, ``top1_error`` and ``top5_error``
        their standard errors over images. {} in all but the leading process.

    Raises:
        SettingsError: the encoder predicts no teacher's output for an image, or the class embeddings are of another
        width. SourceError, ManifestError, TeacherError, MismatchError, DamageError, OutOfMemoryError: see their
        messages.
    """
    with stage_world(settings.speed.device, report) as (world, report), ExitStack() as stack:
        precision = resolve_precision(settings.features.precision, world.device)
        set_backends()
        batch = batch_for(settings.speed.batch, world.device)
        report.phase("opening the images")
        val = world.main_first(lambda: open_val(data, batch))
        for remark in val.remarks:
            report.log(f"{val.root}: {remark}")
        report.phase("loading the encoder")
        encoder = world.main_first(
            lambda: load_aligned(spec, world.device, precision=precision, report=report, teacher=settings.teacher)
        )
        if encoder.label:
            report.log(f"using the head of teacher {encoder.label}")
        size = resolve_size(settings.features, encoder)
        report.phase("opening the class embeddings")
        sources: list[ClassSource] = []

        def identity() -> dict[str, Any]:
            source = class_source(settings, val.classes, world.device, report)
            refuse_other_width(source, encoder.dim, spec, widths=encoder.widths)
            sources.append(source)
            return source.identity

        asked = {
            "evaluation": KIND,
            "settings": fingerprinted(settings),
            "encoder": encoder.identity,
            "feature": "class",
            "image_size": size,
            "data": {"val": val.identity},
            "class_embeddings": world.run_on_main(identity),
        }
        root = out / KIND
        world.run_on_main(lambda: stack.enter_context(writing(out)))
        artifact, result = world.run_on_main(lambda: open_scores(root, asked, type(settings)))
        if result:
            report.log(f"nothing to do: {root} already has this score, top1 {result['top1']:.4f}")
            return result if world.is_main else {}
        features = extract_features(
            out / "features",
            encoder,
            val,
            crop=CentralCrop(size, round(size / settings.features.crop)),
            workers=settings.speed.workers,
            world=world,
            report=report,
        )
        if features is None:
            return {}
        (source,) = sources
        for note in source.notes:
            report.log(note)
        embeddings = source.embed()
        predictions = zeroshot_predictions(features, embeddings, world.device)
        log_rejects(val, features.rejected, report)
        head = f"head of {encoder.label}, " if encoder.label else ""
        images, scores = len(predictions.labels), accuracy(predictions)
        figures = {
            "feature": "class",
            **scores,
            **{f"{name}_error": math.sqrt(share * (1 - share) / images) for name, share in scores.items()},
            "protocol": f"{source.told}, {head}crop {size} of {round(size / settings.features.crop)}",
            "classes": len(val.classes),
            "images": {"train": 0, "val": images},
            "rejected": {"train": 0, "val": len(features.rejected)},
            "per_class": per_class(predictions, val.classes),
        }
        files = write_predictions(root, predictions, val.classes)
        write_classes(root / CLASSES, embeddings, val.classes)
        files[CLASSES] = file_entry(root / CLASSES)
        return save_result(artifact, display_name(spec), figures, files)
