"""How many stored views does a long run need, and with what fidelity?

Claims: after 200 epochs, the scores with 32 views at 0.999 and with 16 at 0.97, the default, are within two standard
errors of those with a fresh crop in every epoch. The score with one view is more than two below that with 8. At 32
views the scores with a fidelity of 0.9 or more are within two standard errors of those with 0.999. All arms take the
same number of steps; "fresh" has as many stored views as epochs, so that no crop is seen twice. 3,000 training images
of imagenette, ViT-Ti teacher at 112 pixels; scores on its 800 val images.

This takes hours, so it can be interrupted: everything is made in WORK, existing results are reused, interrupted runs
resume, and the result is written after every arm. Of a run that another process is training, the existing checkpoints
are scored.

    python -m benchmarks.views --work FOLDER [--arms v1-s0,v32-k97-s0,fresh-s0] [--jobs 2] [--only-score]
        [--picture docs/views.png] [--other benchmarks/results/views-h100.json] [--device cuda]
        [--out benchmarks/results/views-cpu.json]
"""

from __future__ import annotations

import json
import math
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.harness import at_least, at_most, finish, parse_options, write_result
from benchmarks.view_arms import HELD_OUT_VIEWS, Arm, Bench, all_images, parse_arm, quick_images, trained
from benchmarks.view_picture import draw
from benchmarks.view_scores import Scorer, bytes_per_view, kept_epochs, standard_error, training_losses
from cae2pipe.artifacts.artifact import RunArtifact, TargetsArtifact, is_artifact
from cae2pipe.artifacts.atomic import write_json
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import BadInputError, Terminated
from cae2pipe.loading.order import steps_per_epoch
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.progress import Report, progress
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.run_record import run_identity

ARMS = (
    "v1-s0,v8-s0,v32-s0,fresh-s0,v2-s0,v4-s0,v16-s0,v1-s1,v8-s1,v32-s1,fresh-s1,v32-k99-s0,v32-k97-s0,v32-k90-s0,"
    "v8-k97-s0,v16-k97-s0,v8-k90-s0"
)
QUICK_ARMS = "v1-s0,v2-s0,v2-k90-s0,fresh-s0"


def main() -> None:
    options = parse_options(
        __doc__,
        work={"type": Path, "required": True, "help": "folder in which sets, runs and scores are made or reused"},
        arms={"help": f"arms to make and score; default {ARMS}"},
        epochs={"type": int, "help": "epochs per arm, and views of the fresh set; default 200"},
        stored={"type": int, "help": "views of the set for all arms but fresh; default 32"},
        keep={"type": int, "help": "epochs between scores; default 20"},
        linear={"type": int, "help": "epochs between linear scores; default 100"},
        jobs={"type": int, "default": 1, "help": "arms to train at once, each in a process with one thread"},
        picture={"type": Path, "help": "file for a plot of accuracy over epochs and over kB"},
        other={"type": Path, "help": "a result on another device, whose additional arms are plotted too"},
        **{
            "only-score": {"action": "store_true", "help": "only score existing runs"},
            "pixels-once": {"type": float, "help": "kB of an image that is stored once to replay views from it"},
        },
    )
    for name, full, quick in (("epochs", 200, 3), ("stored", 32, 2), ("keep", 20, 1), ("linear", 100, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    torch.set_num_threads(1)
    set_backends()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        options.work.resolve(),
        quick_images(options.work.resolve()) if options.quick else all_images(),
        48 if options.quick else 112,
        options.epochs,
        options.keep,
        options.stored,
        options.device,
        options.quick,
    )
    arms = [parse_arm(name, bench) for name in (options.arms or (QUICK_ARMS if options.quick else ARMS)).split(",")]
    with progress("views") as report:
        try:
            rows = measure(bench, arms, options, report)
        except (KeyboardInterrupt, Terminated):
            sys.exit("stopped; rerun the same command to resume")
    checks, settings, libraries = summary(rows, bench, options)
    finish(options, "views", rows, checks, settings, libraries)
    error = shown(settings["standard_error"])
    print(f"One standard error on {settings['test_images']} test images, in points: {error}")


def measure(bench: Bench, arms: Sequence[Arm], options: Namespace, report: Report) -> list[dict[str, Any]]:
    """Train and score the arms one by one; the result is written after each. Returns the rows of these arms and of all
    that were scored before."""
    done = scored_before(bench, arms, report)
    scorer = None
    with closing(trained(bench, arms, 0 if options.only_score else options.jobs, report)) as ready:
        for arm in ready:
            if not is_artifact(bench.run(arm), "run"):
                report.log(f"{arm.name}: not trained yet")
                continue
            scorer = scorer or Scorer(bench.data, TargetSet(bench.targets("held", report)), bench.size)
            run, settings = adopted(bench, arm)
            score_missing(bench, arm, run, settings=settings, scorer=scorer, linear=options.linear, report=report)
            done[arm] = run
            rows = all_rows(bench, done, options.pixels_once)
            checks, about, libraries = summary(rows, bench, options)
            if options.out:
                write_result(options, "views", rows, checks, about, libraries)
            if options.picture and rows:
                draw(rows + rows_of_other_arms(options.other, rows), about["test_images"], options.picture)
    return all_rows(bench, done, options.pixels_once)


def scored_before(bench: Bench, arms: Sequence[Arm], report: Report) -> dict[Arm, RunArtifact]:
    """Further arms that have scores, with their runs."""
    runs = {}
    for path in sorted((bench.work / "scores").glob("*.json")):
        if path.stem in {arm.name for arm in arms}:
            continue
        try:
            arm = parse_arm(path.stem, bench)
            runs[arm] = adopted(bench, arm)[0]
        except (BadInputError, SystemExit) as error:
            report.log(f"skipped {path.stem}, which was scored before: {error}")
    return runs


def adopted(bench: Bench, arm: Arm) -> tuple[RunArtifact, PretrainSettings]:
    """An arm's run, with its settings.

    Raises:
        MismatchError: the run was made with other settings, or from another target set.
    """
    settings = bench.training(arm)
    asked = run_identity(TargetsArtifact.open(bench.work / arm.targets), settings)
    return RunArtifact.open_same(bench.run(arm), asked, fix="use the options that this run was made with"), settings


def score_missing(
    bench: Bench, arm: Arm, run: RunArtifact, *, settings: PretrainSettings, scorer: Scorer, linear: int, report: Report
) -> None:
    """Score the checkpoints that have no scores yet, into ``WORK/scores``."""
    kept = read_scores(bench, arm, run)
    images = TargetSet(bench.work / arm.targets).images
    steps = steps_per_epoch(images, settings.loaded_batch, settings.data.last_batch)
    for epoch in kept_epochs(run.root, steps, bench.keep):
        wanted = epoch % linear == 0
        scores = kept["epochs"].get(str(epoch))
        if scores and not (wanted and scores["linear"] is None):
            continue
        kept["epochs"][str(epoch)] = scores = scorer.score(run, settings, epoch * steps, wanted)
        write_json(scores_file(bench, arm), kept)
        report.log(f"{arm.name}, epoch {epoch}: {shown(scores)}")


def read_scores(bench: Bench, arm: Arm, run: RunArtifact) -> dict[str, Any]:
    """The content of an arm's file of scores: by epoch, with what they depend on. Scores of another run are ignored."""
    path = scores_file(bench, arm)
    made_from = {"run": run.fingerprint, "held_out": TargetsArtifact.open(bench.work / "held").fingerprint}
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return kept if kept.get("made_from") == made_from else {"made_from": made_from, "epochs": {}}


def scores_file(bench: Bench, arm: Arm) -> Path:
    return bench.work / "scores" / f"{arm.name}.json"


def all_rows(bench: Bench, runs: Mapping[Arm, RunArtifact], pixels_once: float | None) -> list[dict[str, Any]]:
    """The rows of all arms: fewest views first, fresh crops last."""
    ordered = sorted(runs, key=lambda arm: (arm.targets == "fresh", arm.views, -arm.fidelity, arm.seed))
    return [row for arm in ordered for row in arm_rows(bench, arm, runs[arm], pixels_once)]


def rows_of_other_arms(path: Path | None, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of another result for arms that are not in ``rows``."""
    own = {row["arm"] for row in rows}
    return [row for row in json.loads(path.read_text())["rows"] if row["arm"] not in own] if path else []


def arm_rows(bench: Bench, arm: Arm, run: RunArtifact, pixels_once: float | None) -> list[dict[str, Any]]:
    """An arm's row for every checkpoint that has been scored."""
    losses = training_losses(run.root)
    stored = bytes_per_view(TargetSet(bench.work / arm.targets), arm.views)
    rows = []
    for epoch, scores in sorted(
        (int(epoch), scores) for epoch, scores in read_scores(bench, arm, run)["epochs"].items()
    ):
        row = {"arm": arm.name, "views": arm.views, "fidelity": arm.fidelity, "seed": arm.seed, "epoch": epoch}
        row |= {name: None if scores[name] is None else round(scores[name], 2) for name in ("knn", "linear")}
        row |= {"train_loss": round(losses[epoch], 4), "held_out_loss": round(scores["held_out_loss"], 4)}
        latents, pixels = (arm.views * stored[name] / 1000 for name in ("latents", "pixels"))
        row |= {"kb_per_image": round(latents + pixels, 1), "kb_latents": round(latents, 1)}
        if pixels_once is not None:
            row["kb_pixels_once"] = round(latents + pixels_once, 1)
        rows.append(row)
    return rows


def shown(scores: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)


def summary(
    rows: Sequence[dict[str, Any]], bench: Bench, options: Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any], tuple[str, ...]]:
    """Checks of the finished arms, settings and libraries, as arguments of ``finish``."""
    images = sum(1 for path in (bench.data / "val").rglob("*") if path.is_file())
    last = {row["arm"]: row for row in rows if row["epoch"] == bench.epochs}
    settings = {
        "epochs": bench.epochs,
        "size": bench.size,
        "test_images": images,
        "held_out_views": HELD_OUT_VIEWS,
        "pixels_once_kb": options.pixels_once,
        "standard_error": {
            name: round(sum(errors) / len(errors), 2)
            for name in ("knn", "linear")
            if (errors := [standard_error(row[name], images) for row in last.values() if row[name] is not None])
        },
    }
    return checks_of(last, images, bench.stored), settings, ("torch", "timm", "numcodecs")


def checks_of(last: dict[str, dict[str, Any]], images: int, most: int) -> list[dict[str, Any]]:
    """The claims about the last epoch of seed 0 for which both arms exist, in standard errors of the difference."""
    claims = [
        ("fresh-s0", "v8-s0", at_most),
        ("fresh-s0", f"v{most}-s0", at_most),
        ("fresh-s0", "v16-k97-s0", at_most),
        ("v8-s0", "v1-s0", at_least),
        *((f"v{most}-s0", f"v{most}-k{digits}-s0", at_most) for digits in ("99", "97", "90")),
    ]
    checks = []
    for above, below, check in claims:
        for score in ("knn", "linear"):
            if above not in last or below not in last or last[below][score] is None or last[above][score] is None:
                continue
            one, other = last[above][score], last[below][score]
            error = math.hypot(standard_error(one, images), standard_error(other, images))
            name = f"{score}: {above} over {below}, {one - other:+.1f} points, in standard errors"
            checks.append(check(name, (one - other) / error if error else 0.0, 2.0, 2))
    return checks


def leave(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    main()
