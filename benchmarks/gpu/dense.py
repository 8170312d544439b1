"""G: segmentation and detection once, on synthetic maps and boxes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection.rpn import RegionProposalNetwork

from benchmarks.gpu.parts import Found, NotHereError
from benchmarks.gpu.scores import first_and_last
from benchmarks.gpu.state import State
from cae2pipe.config.base import load
from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.errors import SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate_dense import detect, require_dense, segment

COLOURS = np.array([(230, 220, 40), (20, 30, 60), (200, 20, 30), (90, 90, 90)], dtype=np.uint8)


def segmentation(state: State, found: Found) -> None:
    """UperNet for twenty steps, compiled if training is, and its sliding window."""
    ready()
    side = 32 if state.quick else 224
    values = {
        "steps": 20,
        "warmup_steps": 2,
        "batch": 4,
        "chunk": 2,
        "image_size": side,
        "scale": [2 * side, side],
        "stride": side * 2 // 3,
        "decoder_width": 16 if state.quick else 64,
        "pictures": 1,
        "speed": {"device": state.device, "workers": 0 if state.quick else 4},
    }
    settings = load(SegmentSettings, "evaluate", "segment", overrides=(), values=values)
    data = state.once("maps", lambda folder: write_maps(folder, side))
    began = time.perf_counter()
    result = segment(str(state.encoder()), data, state.scratch / "segmented", settings=settings, report=Silent())
    told(found, "segment", result, result["miou"], time.perf_counter() - began)


def detection(state: State, found: Found) -> None:
    """Mask R-CNN and its cascade for ten steps, with scores; proposals must be float32 even under autocast."""
    ready()
    side = 64 if state.quick else 256
    values = {
        "epochs": 2,
        "drops": [1],
        "warmup_steps": 2,
        "batch": 2,
        "chunk": 1,
        "short_sides": [side],
        "long_side": side * 3 // 2,
        "proposals": 20 if state.quick else 1000,
        "rois": 16 if state.quick else 128,
        "crop": 0.3,
        "score": 0.01,
        "detections": 5,
        "pictures": 1,
        "precision": "bf16",
        "speed": {"device": state.device, "workers": 0 if state.quick else 4},
    }
    data = state.once("boxes", lambda folder: write_boxes(folder, 5 if state.quick else 10, side))
    types: set[torch.dtype] = set()
    real = RegionProposalNetwork.forward

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        proposals, losses = real(self, *arguments, **named)
        types.update(boxes.dtype for boxes in proposals)
        return proposals, losses

    for cascade in (False,) if state.quick else (False, True):
        name = "detect, cascade" if cascade else "detect"
        settings = load(DetectSettings, "evaluate", "detect", overrides=(), values={**values, "cascade": cascade})
        out = state.scratch / name.replace(", ", "-")
        began = time.perf_counter()
        with patch.object(RegionProposalNetwork, "forward", watched):
            result = detect(str(state.encoder()), data, out, settings=settings, report=Silent())
        told(found, name, result, result["ap_box"], time.perf_counter() - began)
    found.check(f"proposals are float32 ({', '.join(map(str, types))})", types == {torch.float32})


def ready() -> None:
    """Raise NotHereError if the extra ``dense`` is not installed."""
    try:
        require_dense()
    except SettingsError as error:
        raise NotHereError(error.what) from None


def told(found: Found, name: str, result: dict[str, Any], score: float, seconds: float) -> None:
    losses = [line["loss"] for line in result["history"]]
    row = {"evaluation": name, "score": round(score, 4), "losses": first_and_last(losses)}
    found.rows.append(row | {"seconds": round(seconds, 1)})
    found.check(f"{name} ends with a result, losses finite", all(map(math.isfinite, losses)))


def write_maps(root: Path, side: int) -> None:
    """Images with four coloured quarters, and labels of the colours."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((side, side + side // 4), dtype=np.uint8)
            top, left = (int(side * share) for share in rng.uniform(0.3, 0.7, 2))
            labels[:top, :left], labels[:top, left:], labels[top:, :left], labels[top:, left:] = rng.permutation(4)
            pixels = np.clip(COLOURS[labels].astype(int) + rng.integers(-12, 13, (*labels.shape, 3)), 0, 255)
            for kind, array in (("images", pixels.astype(np.uint8)), ("annotations", labels)):
                Image.fromarray(array).save(root / kind / part / f"{number}.png")
    (root / "classes.txt").write_text("yellow\nblue\nred\ngrey\n")


def write_boxes(root: Path, count: int, side: int) -> None:
    """Images with a red rectangle, half of them also with a blue one, in COCO's format."""
    rng = np.random.default_rng(0)
    high, wide = side // 3, side // 2
    for part, images in (("train2017", count), ("val2017", 3)):
        entries: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        (root / part).mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(90, 120, (side, side * 4 // 3, 3)).astype(np.uint8)
            for category in range(1 + number % 2):
                x, y = int(rng.integers(1, side // 2)), int(rng.integers(1, side // 2))
                pixels[y : y + high, x : x + wide] = ((220, 30, 30), (30, 30, 220))[category]
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": number,
                        "category_id": (7, 3)[category],
                        "bbox": [x, y, wide, high],
                        "area": wide * high,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + wide, y, x + wide, y + high, x, y + high]],
                    }
                )
            entries.append({"id": number, "width": side * 4 // 3, "height": side, "file_name": f"{number}.png"})
            Image.fromarray(pixels).save(root / part / f"{number}.png")
        (root / "annotations").mkdir(exist_ok=True)
        categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
        content = {"images": entries, "annotations": objects, "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
