"""How much of the teacher's own speed does extraction keep?

Claim: extraction of full-size photographs reaches at least 0.85 of the views/s of the teacher's forward pass alone on
the same batches: everything else, from decoding to writing, runs concurrently.

    python -m benchmarks.extraction [--quick] [--device cpu] [--out benchmarks/results/extraction-cpu.json]
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import at_least, figures, finish, in_turns, median_ratio, parse_options
from benchmarks.sample import copies, packed, photographs, rendered, settings, teacher_of
from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.threads import in_threads
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.encoding import Meter, lane_count
from cae2pipe.targets.extraction import make_views
from cae2pipe.targets.missing import missing_units

VIEWS = 4
COPIES = 4
"""Copies of each photograph: there are about 100, and workers take a second to start."""


def main() -> None:
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = copies(photographs(scratch, 100), scratch, COPIES)
        chosen = settings(options.device, scratch, views=VIEWS)
        shards = packed(source, scratch, chosen)
        teacher = teacher_of(chosen)
        batches = [block.pixels[0] for block in rendered(shards, chosen, 4)]
        extract_targets(shards.root, scratch / "set", chosen, report=Silent(), calibrate_only=True)
        meters: list[Meter] = []
        number = 0

        def bare() -> float:
            began, done = time.perf_counter(), 0
            while done < 512:
                for batch in batches:
                    teacher(batch.to(teacher.device))
                    done += len(batch)
            if teacher.device.type == "cuda":
                torch.cuda.synchronize()
            return done / (time.perf_counter() - began)

        def bare_in_lanes() -> float:
            """The forward pass as in extraction: on a CPU one batch per core."""
            began, count = time.perf_counter(), max(1, 512 // len(batches[0]))
            width = lane_count(None, teacher.device)
            tasks = ((batches[number % len(batches)].to(teacher.device),) for number in range(count))
            done = sum(in_threads(lambda batch: len(teacher(batch).tokens), tasks, width, most=width + 1))
            if teacher.device.type == "cuda":
                torch.cuda.synchronize()
            return done / (time.perf_counter() - began)

        def extraction() -> float:
            nonlocal number
            number += 1
            out = scratch / f"set{number}"
            shutil.copytree(scratch / "set", out)
            artifact = open_artifact(out)
            missing = missing_units(artifact, shards, VIEWS)
            meters.append(
                make_views(
                    artifact,
                    shards,
                    missing,
                    teacher=teacher,
                    settings=chosen,
                    workers=worker_count(-1),
                    report=Silent(),
                )
            )
            shutil.rmtree(out)
            return meters[-1].rate()

        contenders = {"teacher": bare, "in lanes": bare_in_lanes, "extraction": extraction}
        speeds = in_turns(contenders, 2 if options.quick else 5)
    ratio = median_ratio(speeds["extraction"], speeds["teacher"])
    last = meters[-1]
    rows = [
        {"what": "the teacher's forward", "views/s": figures(speeds["teacher"])},
        {"what": "the same, a batch a core", "views/s": figures(speeds["in lanes"])},
        {
            "what": f"extraction, {VIEWS} views",
            "views/s": figures(speeds["extraction"]),
            "of_teacher": round(ratio, 3),
            "teacher_waits": round(last.idle_fraction(), 3),
            "waited_for_rendering_s": round(last.rendering, 1),
            "waited_for_packing_s": round(last.packing, 1),
        },
    ]
    checks = [at_least("extraction over the teacher's forward", ratio, 0.85)]
    finish(options, "extraction", rows, checks, {"views": VIEWS, "images": shards.images}, ("torch", "timm", "pillow"))


if __name__ == "__main__":
    main()
