"""What long commands say that they do, and wait for."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from cae2pipe.artifacts.lock import holding
from cae2pipe.config.base import build
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import KnnSettings
from cae2pipe.config.extract import CodecSettings
from cae2pipe.evaluation.grid_plan import GridPlan, Planned
from cae2pipe.loading.joining import join_sets
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.compare import run_part
from cae2pipe.stages.estimate_targets import estimate_targets
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.verify import verify
from cae2pipe.targets.target_set import TargetSet

KNN = build(KnnSettings, {"k": [5], "speed": {"workers": 0, "device": "cpu"}}, "test")
PRETRAIN = [
    "opening the target set",
    "building the model",
    "looking for checkpoints",
    "training",
    "wait: the first step",
    "10 steps",
    "wait: the checkpoint of step 10",
    "writing the encoder",
]


class Phases(Silent):
    """Keeps phases, waits, and what was done of a total."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.n = self.done = 0
        self.unit = ""

    def phase(self, name: str) -> None:
        self.seen.append(name)

    def total(self, n: int, unit: str, done: int = 0) -> None:
        self.n, self.done, self.unit = n, done, unit

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self.done += n
        if self.done == self.n:
            self.seen.append(f"{self.n} {self.unit}")

    def waits_for(self, what: str) -> None:
        self.seen.append(f"wait: {what}")


def test_extraction_and_recoding(photos, extract_settings, tmp_path):
    report = Phases()
    out = tmp_path / "targets"
    extract_targets(photos, out, extract_settings(codec={"name": "fp16"}), report=report)
    assert report.seen == [
        "loading the teacher",
        "listing the images",
        "checking and packing the images",
        "150 images",
        "calibrating the fp16 codec on up to 64 images",
        "64 images",
        "fitting the fp16 codec",
        "reducing the images that views are replayed from",
        "150 images",
        "storing views and latents",
        "300 views",
    ]
    report = Phases()
    recode(out, tmp_path / "int8", build(CodecSettings, {"name": "int8"}, "test"), report=report, workers=0)
    assert report.seen == [
        "calibrating the int8 codec on up to 512 images",
        "copying the images",
        "3 shards",
        "recoding",
        "300 views",
    ]


def test_an_estimate_is_less_work_than_the_extraction(photos, extract_settings):
    report = Phases()
    estimate_targets(photos, extract_settings(), report)
    assert report.seen == [
        "loading the teacher",
        "listing the images",
        "checking the first images",
        "64 images",
        "running the teacher on about 64 of 150 images",
        "64 images",
        "trying the codecs on them",
        "3 codecs",
        "extracting from them to measure the speed",
        "64 views",  # of 300
    ]


def test_a_process_says_which_other_it_waits_for(photos, extract_settings, tmp_path):
    out, waits = tmp_path / "targets", threading.Event()

    class Waiting(Phases):
        def waits_for(self, what: str) -> None:
            super().waits_for(what)
            waits.set()

    report = Waiting()
    with holding(out, "sharding"):
        thread = threading.Thread(
            target=extract_targets, args=(photos, out, extract_settings()), kwargs={"report": report}
        )
        thread.start()
        assert waits.wait(60)
    thread.join()
    assert report.seen[:2] == ["loading the teacher", "wait: another process to shard the images"]
    assert report.seen[-1] == "300 views"


def test_training_scoring_and_checking(target_root, photos, pretrain_settings, tmp_path):
    report = Phases()
    pretrain(target_root, tmp_path / "run", pretrain_settings(), report=report)
    assert report.seen == PRETRAIN

    report = Phases()
    for split in ("train", "val"):
        shutil.copytree(photos, tmp_path / "data" / split)
    evaluate("knn", str(tmp_path / "run"), tmp_path / "data", out=tmp_path / "scores", settings=KNN, report=report)
    assert report.seen == [
        "opening the images",
        "loading the encoder",
        "computing features of train",
        "3 batches",
        "computing features of val",
        "3 batches",
        "finding nearest neighbours",
    ]

    report = Phases()
    verify(tmp_path / "run", report)
    assert report.seen == ["checking files", "2 files", "checking that the contents fit together"]


def test_a_run_of_a_grid_says_which_it_is(target_root, pretrain_settings, tmp_path):
    values = {"title": "a", "config": "tiny", "variants": [{"name": "one"}], "evaluate": [{"kind": "knn"}]}
    grid = build(GridSettings, values, "test")
    run = Planned(variant=0, seed=0, name="run", scored="scored", settings=pretrain_settings(), codec=None)
    report = Phases()
    plan = GridPlan(grid, join_sets([TargetSet(target_root)]), [run], {})
    run_part(plan, data=Path(), out=tmp_path, report=report)
    own = [f"run 1 of 1, {name}" if not name.startswith(("wait", "10 ")) else name for name in PRETRAIN]
    assert report.seen == own
