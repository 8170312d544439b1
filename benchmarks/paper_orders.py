"""Tables 1, 2 and 5 of the paper at a scale where they can differ: 14 x 14 patches and a small mask ratio.

The variants of the grids `table1`, `table2` and `table5` of `cae2pipe compare`, at their small scale but with patches
of 8 pixels (196 of them, as in the paper), masks of a quarter and 40 epochs. 3,000 training images of imagenette, four
stored views, ViT-Ti teacher that sees them at 224 pixels; scores of the mean patch on 800 val images. The result says
of every image whether it is classified correctly, for comparisons image by image. Equal variants of several grids are
trained once.

A run takes half an hour on one core, so all take a night. The result is written after every run, and runs that it has
are not repeated, even if WORK is lost:

    python -m benchmarks.paper_orders --work FOLDER [--seeds 3] --out benchmarks/results/paper_orders-cpu.json
"""

from __future__ import annotations

import json
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import parse_options, print_table, write_result
from benchmarks.paired import packed
from benchmarks.teacher_grid import FIDELITY
from benchmarks.view_arms import Bench, fill_in, interruptible, make_bench
from benchmarks.view_scores import CPU, Labels, percent
from benchmarks.views import leave
from cae2pipe.config.base import fingerprinted, load, merge
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.evaluation.grid_plan import expand, run_name
from cae2pipe.runtime.progress import Report
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain

GRIDS = ("table1", "table2", "table5")
SCALE = {"epochs": 40, "model": {"patch_size": 8}, "mask": {"ratio": 0.25}}
"""Over the small scale of the grids."""
QUICK = {"epochs": 3, "model": {"image_size": 32}, "data": {"batch": 32}}


class Planned(NamedTuple):
    """A run: its grid, the variant's name, its seed and settings, and a name that depends on all that the result
    depends on."""

    grid: str
    variant: str
    seed: int
    settings: PretrainSettings
    name: str


def main() -> None:
    options = parse_options(
        __doc__,
        work={"type": Path, "required": True, "help": "folder in which the target set and runs are made or resumed"},
        seeds={"type": int, "help": "runs per variant; default 3"},
        views={"type": int, "help": "stored views of each image; default 4"},
    )
    fill_in(options, seeds=(3, 1), views=(4, 1))
    bench = make_bench(options, 0)
    rows = interruptible("paper_orders", lambda report: measure(bench, options, report))
    print_table("paper_orders", [{name: row[name] for name in row if name != "right"} for row in rows])
    if options.out:
        write_result(options, "paper_orders", rows, [], about(bench), ("torch", "timm"))


def measure(bench: Bench, options: Namespace, report: Report) -> list[dict[str, Any]]:
    """Train and score what the result does not have, seed by seed. Returns the rows, one for each run of each grid."""
    settings = extraction(bench)
    plan = planned(options, fingerprinted(settings))
    rows = known_rows(options.out)
    if any(run.name not in {row["run"] for row in rows} for run in plan):
        extract_targets(bench.data / "train", bench.work / "set", settings, report=report)
    scorer = Labels(bench.data, bench.size)
    for run in plan:
        scores = next((row for row in rows if row["run"] == run.name), None)
        if scores is None:
            folder = bench.work / "runs" / run.name
            pretrain(bench.work / "set", folder, run.settings, report=report)
            right = scorer.right(load_encoder(str(folder), 0, CPU), True, "mean")
            scores = {name: round(percent(each), 2) for name, each in right.items()}
            scores["right"] = {name: packed(each.numpy()) for name, each in right.items()}
        row = {"grid": run.grid, "variant": run.variant, "seed": run.seed, "run": run.name}
        report.log(f"{row}: kNN {scores['knn']}, linear {scores['linear']}")
        row |= {name: scores[name] for name in ("knn", "linear", "right")}
        rows = [*(old for old in rows if (old["grid"], old["run"]) != (run.grid, run.name)), row]
        if options.out:
            write_result(options, "paper_orders", rows, [], about(bench), ("torch", "timm"))
    names = {run.name for run in plan}
    return [row for row in rows if row["run"] in names]


def known_rows(out: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier result."""
    if out is None or not out.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def extraction(bench: Bench) -> ExtractSettings:
    """Stage 1: a teacher at twice the views' size has the student's 14 x 14 patches of its own."""
    chosen = bench.stage_1(bench.stored, {"name": "klt", "fidelity": FIDELITY})
    return chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update={"image_size": 2 * bench.size})})


def planned(options: Namespace, made_from: Any) -> list[Planned]:
    """All runs, seed by seed."""
    runs = []
    for grid in GRIDS:
        chosen = load(GridSettings, "compare", grid, overrides=(), values={"seeds": list(range(options.seeds))})
        scale = merge(merge(chosen.small, SCALE), QUICK if options.quick else {})
        chosen = chosen.model_copy(update={"small": scale})
        for index, settings in expand(chosen, True, {"device": options.device, "workers": 0}):
            views = settings.data.model_copy(update={"views": options.views})
            settings = settings.model_copy(update={"data": views, "precision": "fp32"})
            name = run_name(settings, made_from, None)
            runs.append(Planned(grid, chosen.variants[index].name, settings.seed, settings, name))
    return sorted(runs, key=lambda run: run.seed)


def about(bench: Bench) -> dict[str, Any]:
    """Settings of the result."""
    return {"views": bench.stored, "fidelity": FIDELITY, "test_images": bench.test_images, **SCALE}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    main()
