"""How many images should a teacher process at once on a CPU?

Claim: in groups of 8 (``cae2pipe.teachers.protocol.CPU_BATCH``) a convolutional teacher is faster than with a block of
64 at once, and a ViT no slower. The weights are random, since speed does not depend on them.

    python -m benchmarks.teacher_batch [--quick] [--device cpu] [--out benchmarks/results/teacher_batch-cpu.json]
"""

from __future__ import annotations

import timm
import torch

from benchmarks.harness import at_least, figures, finish, in_turns, median_ratio, parse_options, rate
from cae2pipe.teachers.timm_models import feature_map

GROUPS = (8, 64)
MODELS = ("tf_efficientnet_lite0", "vit_tiny_patch16_224")


def forward(name: str, model: torch.nn.Module, pixels: torch.Tensor, group: int) -> None:
    with torch.inference_mode():
        for part in pixels.split(group):
            if name.startswith("vit"):
                model.forward_features(part)
            else:
                feature_map(model, part, 3)
    if pixels.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    options = parse_options(__doc__)
    pixels = torch.randn(64, 3, 224, 224, device=options.device)
    rows, checks = [], []
    for name in MODELS:
        model = timm.create_model(name, num_classes=0).to(options.device).eval()
        measures = {
            str(group): lambda group=group, name=name, model=model: rate(
                lambda: forward(name, model, pixels, group), len(pixels)
            )
            for group in GROUPS
        }
        speeds = in_turns(measures, 3 if options.quick else 9)
        rows += [{"model": name, "group": group, "images/s": figures(speeds[str(group)])} for group in GROUPS]
        checks.append(at_least(f"{name}: 8 over 64", median_ratio(speeds["8"], speeds["64"]), 0.95))
    finish(options, "teacher_batch", rows, checks, {"images": len(pixels)}, ("torch", "timm"))


if __name__ == "__main__":
    main()
