"""How much does training from blocks save, compared with decoding full-size photographs?

Claims: from stored views the block loader reaches at least 4 times the images/s per core of decoding full-size
photographs with a random resized crop; from replayed views, which take fewer bytes, at least the same rate. The loader
also decompresses latents and draws masks; the other side only makes pixels.

    python -m benchmarks.loader [--quick] [--device cpu] [--out benchmarks/results/loader-cpu.json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

from benchmarks.harness import at_least, figures, finish, in_turns, median_ratio, parse_options, rate
from benchmarks.sample import copies, photographs, settings
from cae2pipe.config.base import load
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet

COPIES = 6
"""Copies of each photograph: with about 100 images every block would be split between two streams, and read twice."""
TRAINING = {"epochs": 2, "optimizer": {"warmup_epochs": 1}, "data": {"batch": 64, "streams": 4}}


def main() -> None:
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = photographs(scratch, 100)
        originals_folder = copies(source, scratch, COPIES)
        chosen = load(PretrainSettings, "pretrain", "tiny", overrides=(), values=TRAINING)
        plans = {}
        for pixels in ("stored", "replayed"):
            chosen_views = settings(options.device, scratch, views=1, view={"pixels": pixels})
            extract_targets(originals_folder, scratch / pixels, chosen_views, report=Silent())
            targets = TargetSet(scratch / pixels)
            plans[pixels] = make_plan(targets, sorted(targets.stores), chosen, drop_columns=0)
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
        crop = Compose(
            [
                RandomResizedCrop(224, scale=(0.4, 1), interpolation=InterpolationMode.BICUBIC, antialias=True),
                RandomHorizontalFlip(),
            ]
        )

        def originals() -> None:
            for path in files:
                np.asarray(crop(Image.open(path).convert("RGB")))

        def blocks(pixels: str) -> float:
            plan = plans[pixels]

            def work() -> None:
                for _ in load_batches(plan, 0, 0):
                    pass

            return rate(work, plan.samples * plan.epochs)

        measures = {
            "originals": lambda: rate(originals, len(files)),
            "stored": lambda: blocks("stored"),
            "replayed": lambda: blocks("replayed"),
        }
        speeds = in_turns(measures, 3 if options.quick else 9)
    ratios = {pixels: median_ratio(speeds[pixels], speeds["originals"]) for pixels in plans}
    rows = [{"loader": "full-size photographs, random resized crop", "images/s": figures(speeds["originals"], 0)}]
    rows += [
        {"loader": f"blocks of {pixels} views", "images/s": figures(speeds[pixels], 0), "times": round(ratio, 2)}
        for pixels, ratio in ratios.items()
    ]
    checks = [
        at_least("block loader, stored views, over full-size photographs, one core", ratios["stored"], 4),
        at_least("block loader, replayed views, over full-size photographs, one core", ratios["replayed"], 1),
    ]
    finish(options, "loader", rows, checks, {"photographs": len(files)}, ("torch", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
