"""COCO's average precision, computed by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from typing import Any, TypedDict

import numpy as np

from cae2pipe.dense.coco_file import Dataset, RunLengths

KINDS = {"bbox": "box", "segm": "mask"}
SIZES = ("small", "medium", "large")


class Detection(TypedDict):
    """``bbox``: x, y, width, height in pixels of the image."""

    image_id: int
    category_id: int
    score: float
    bbox: list[float]
    segmentation: RunLengths


def average_precision(dataset: Dataset, detections: list[Detection]) -> dict[str, Any]:
    """Scores of detections.

    Args:
        dataset: COCO's instances. Ids of images and annotations are integers from 1: an annotation with id 0 would
        count as never detected. Names of categories are unique.

    Returns:
        ``ap_box`` and ``ap_mask``, means over IoU 0.5 to 0.95 and categories; under ``box`` and ``mask`` also
        ``ap50``, ``ap75``, those of small, medium and large objects (None if there are none), and ``per_class``.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    names = {each["id"]: each["name"] for each in dataset["categories"]}
    result: dict[str, Any] = {}
    for kind, name in KINDS.items():
        if not detections:
            result[f"ap_{name}"] = 0.0
            result[name] = {}
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(dataset)
            evaluation = COCOeval_faster(truth, truth.loadRes(detections), kind)
            evaluation.evaluate()
            evaluation.accumulate()
        # Axes: IoU thresholds, recalls, categories, sizes, maximum detections per image; -1 if there is no such object.
        precision = np.asarray(evaluation.eval["precision"])
        thresholds = np.asarray(evaluation.params.iouThrs)

        def mean(part: np.ndarray) -> float | None:
            known = part[part > -1]
            return float(known.mean()) if known.size else None

        whole = precision[:, :, :, 0, -1]
        by_class = {names[number]: mean(whole[:, :, index]) for index, number in enumerate(evaluation.params.catIds)}
        result[f"ap_{name}"] = mean(whole) or 0.0
        result[name] = {
            "ap50": mean(whole[np.isclose(thresholds, 0.5)]),
            "ap75": mean(whole[np.isclose(thresholds, 0.75)]),
            **{f"ap_{size}": mean(precision[:, :, :, index, -1]) for index, size in enumerate(SIZES, 1)},
            "per_class": {name: value for name, value in by_class.items() if value is not None},
        }
    return result
