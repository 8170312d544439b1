"""The benchmark of teachers that see more pixels than the student: what its arms are, and the row of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.teacher_grid import KINDS, arm_row, extraction, remembered
from benchmarks.view_arms import Arm, Bench
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.fit import check_fit
from tests.conftest import write_photos

pytestmark = pytest.mark.filterwarnings("ignore:CAE2PIPE_REAL")


def test_every_arm_suits_the_same_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAE2PIPE_REAL", raising=False)
    bench = Bench(tmp_path, tmp_path / "images", 32, 2, 2, 1, "cpu", True)
    write_photos(tmp_path / "images" / "train", classes=2, each=32)
    tokens, pixels = {}, {}
    for kind in KINDS:
        extract_targets(bench.data / "train", tmp_path / kind, extraction(bench, kind), report=Silent())
        targets = TargetSet(tmp_path / kind, image_size=32)
        check_fit(targets, bench.training(Arm("", kind, 1, 0.999, 0)), 1)
        assert (targets.teacher.rows, targets.teacher.cols) == (2, 2)
        tokens[kind], pixels[kind] = targets[0].tokens, targets[0].pixels
    assert (pixels["own"] == pixels["enlarged"]).all()
    assert not (pixels["own"] == pixels["finer"]).all()
    assert abs(pixels["own"].astype(int) - pixels["finer"]).mean() < 16  # the same crop
    assert abs(tokens["enlarged"] - tokens["own"]).max() > 1e-3
    students = [{"knn": 50.0, "linear": 60.0}, {"knn": 52.0, "linear": 61.0}]
    row = arm_row(bench, "finer", {"knn": 90.0, "linear": 91.0}, students)
    assert (row["knn_mean"], row["knn_spread"], row["teacher_linear"]) == (51.0, 1.41, 91.0)
    assert row["kb_pixels_per_view"] > arm_row(bench, "own", students[0], students)["kb_pixels_per_view"]


def test_scores_of_another_run_are_measured_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tmp_path, 32, 2, 2, 1, "cpu", True)
    assert remembered(bench, "own-s0", "one", lambda: {"knn": 1.0}) == {"knn": 1.0}
    assert remembered(bench, "own-s0", "one", lambda: {"knn": 2.0}) == {"knn": 1.0}
    assert remembered(bench, "own-s0", "other", lambda: {"knn": 2.0}) == {"knn": 2.0}
