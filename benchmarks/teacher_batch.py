"""How many images should pass a teacher together on a CPU?

Claim: in groups of 8 (``cae2pipe.teachers.protocol.CPU_BATCH``) a convolutional teacher is faster than with a block of
64 at once, and a ViT no slower. Architectures with random weights: speed does not hang on them.

    python benchmarks/teacher_batch.py [--quick] [--device cpu] [--out benchmarks/results/teacher_batch-cpu.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import timm
import torch

from cae2pipe.teachers.timm import feature_map

GROUPS = (8, 64)
MODELS = ("tf_efficientnet_lite0", "vit_tiny_patch16_224")


def images_per_second(name: str, model: torch.nn.Module, pixels: torch.Tensor, group: int) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        for part in pixels.split(group):
            if name.startswith("vit"):
                model.forward_features(part)
            else:
                feature_map(model, part, 3)
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return len(pixels) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds = 3 if options.quick else 9
    pixels = torch.randn(64, 3, 224, 224, device=options.device)
    rows, checks = [], []
    for name in MODELS:
        model = timm.create_model(name, num_classes=0).to(options.device).eval()
        found: dict[int, list[float]] = {group: [] for group in GROUPS}
        for turn in range(rounds + 1):
            for group in GROUPS:  # in turns, so that a noisy machine troubles all alike
                rate = images_per_second(name, model, pixels, group)
                if turn:  # the first round warms up
                    found[group].append(rate)
        for group, rates in found.items():
            row = {"model": name, "group": group, "images_per_s": round(statistics.median(rates), 1)}
            rows.append({**row, "spread": [round(min(rates), 1), round(max(rates), 1)]})
            print(rows[-1])
        ratio = statistics.median(a / b for a, b in zip(found[8], found[64], strict=True))
        checks.append({"name": f"{name}: 8 over 64", "value": round(ratio, 3), "goal": 0.95, "ok": ratio >= 0.95})
        print(checks[-1])
    result = {
        "benchmark": "teacher_batch",
        "device": torch.cuda.get_device_name() if pixels.is_cuda else f"{platform.machine()} CPU",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "settings": {"rounds": rounds, "threads": torch.get_num_threads(), "images": len(pixels)},
        "rows": rows,
        "checks": checks,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
