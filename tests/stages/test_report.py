"""``cae2pipe report``: some runs, their scores found by encoder, pictures from stored views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import KnnSettings
from cae2pipe.errors import BadInputError, ManifestError, SettingsError, SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.report import report_runs
from tests.conftest import contents, edit_manifest

PIXELS = {"loss": {"target": "pixels", "kind": "mse", "visible": 0.0}, "mask": {"strategy": "random"}}


@pytest.fixture(scope="module")
def made(target_root, pretrain_settings, photos, tmp_path_factory) -> Path:
    """Two seeds of one run, a masked autoencoder and an unfinished run; the first and the third are scored."""
    root = tmp_path_factory.mktemp("report")
    for part in ("train", "val"):
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / part).symlink_to(photos)
    settings = {
        "seed0": pretrain_settings(epochs=1, optimizer={"warmup_epochs": 0}),
        "seed1": pretrain_settings(epochs=1, seed=1, optimizer={"warmup_epochs": 0}),
        "mae": pretrain_settings(epochs=1, method="mae", optimizer={"warmup_epochs": 0}, **PIXELS),
        "half": pretrain_settings(epochs=1, data={"window": 1}, optimizer={"warmup_epochs": 0}, stop_after=2),
    }
    for name, own in settings.items():
        pretrain(target_root, root / "runs" / name, own, report=Silent())
    knn = load(KnnSettings, "evaluate", "knn", overrides=["speed.workers=0", "speed.device=cpu", "k=5"])
    for name in ("seed0", "mae"):
        evaluate(
            "knn",
            str(root / "runs" / name),
            root / "data",
            out=root / "scores" / "deep" / name,
            settings=knn,
            report=Silent(),
        )
    return root


def runs(made: Path) -> list[Path]:
    return [made / "runs" / name for name in ("seed0", "seed1", "mae", "half")]


def test_seeds_share_a_row_and_scores_find_their_runs(made, target_root, tmp_path):
    scores = [made / "scores"]
    found = report_runs(runs(made), scores, [target_root], out=tmp_path / "out", report=Silent(), device="cpu")
    assert [row.name for row in found.rows] == [
        "seed0 and 1 more",
        "mae (method=mae, loss.kind=mse, loss.target=pixels, loss.visible=0.0, mask.strategy=random)",
        "half (data.window=1)",
    ]
    assert [len(row.runs) for row in found.rows] == [2, 1, 0]
    assert [len(row.scores.get("knn", [])) for row in found.rows] == [1, 1, 0]
    assert [row.latents is None for row in found.rows] == [False, True, False]
    assert found.rows[0].hours[0] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page
    # With pixel targets there are no latents to show, but masks and neighbours.
    assert page.count("Latents of seed0 and 1 more as colours") == 4
    assert "Latents of mae" not in page
    assert "half (unfinished, epoch 1 of 1)" in page
    assert "random, 6 of 16 masked" in page
    assert "block, 6 of 16 masked" in page
    before = contents(tmp_path / "out")
    report_runs(runs(made), scores, [target_root], out=tmp_path / "out", report=Silent(), device="cpu")
    assert contents(tmp_path / "out") == before


def test_without_targets_and_scores_there_are_losses(made, tmp_path):
    found = report_runs(runs(made)[:2], [], [], out=tmp_path / "out", report=Silent())
    assert found.columns == []
    assert "Nearest neighbours" not in (tmp_path / "out" / "report.html").read_text()
    assert "| seed0 and 1 more |" in (tmp_path / "out" / "report.md").read_text()


def test_what_no_picture_can_be_made_of_is_named(made, target_root, tmp_path):
    shutil.copytree(made / "runs" / "seed0", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    taught = made / "runs" / "seed1"
    shutil.copytree(taught, tmp_path / "other")
    teacher = json.loads((taught / "manifest.json").read_text())["teacher"]
    edit_manifest(tmp_path / "other", teacher={**teacher, "name": "elsewhere"})
    chosen = [tmp_path / "bare", tmp_path / "other"]
    report = Silent()
    for run in chosen:
        report_runs([run], [], [target_root], out=tmp_path / "out" / run.name, report=report, device="cpu")
    assert "no pictures of bare (the run has no readable checkpoint)" in report.lines
    bare, other = ((tmp_path / "out" / run.name / "report.html").read_text() for run in chosen)
    assert "No pictures of: bare (the run has no readable checkpoint)" in bare
    assert "teacher mismatch: run used elsewhere, target set has " in other


def test_what_is_no_run_is_refused(made, target_root, tmp_path):
    with pytest.raises(ManifestError, match="expected 'run'"):
        report_runs([target_root], [], [], out=tmp_path / "out", report=Silent())
    with pytest.raises(SettingsError, match="twice"):
        report_runs(
            [made / "runs" / "seed0", made / "runs" / ".." / "runs" / "seed0"], [], [], out=tmp_path, report=Silent()
        )


def test_cached_and_online_runs_and_runs_on_fewer_views_are_other_rows(
    made, target_root, pretrain_settings, teacher_file, tmp_path
):
    once = {"epochs": 1, "optimizer": {"warmup_epochs": 0}}
    pretrain(target_root, tmp_path / "view", pretrain_settings(**once, data={"views": 1}), report=Silent())
    online = pretrain_settings(**once, targets="online", teacher_weights=str(teacher_file))
    pretrain(target_root, tmp_path / "online", online, report=Silent())
    three = [made / "runs" / "seed0", tmp_path / "online", tmp_path / "view"]
    found = report_runs(three, [], [], out=tmp_path / "out", report=Silent())
    assert [row.name for row in found.rows[:2]] == ["seed0", "online (targets=online)"]
    assert "data.views=1" in found.rows[2].name


def test_a_copy_of_a_run_is_no_second_seed(made, tmp_path):
    shutil.copytree(made / "runs" / "seed0", tmp_path / "copy")
    with pytest.raises(SettingsError, match=r"the same run \(seed 0\)"):
        report_runs([made / "runs" / "seed0", tmp_path / "copy"], [], [], out=tmp_path / "out", report=Silent())


def test_scores_that_cannot_be_read_are_not_passed_over(made, tmp_path):
    shutil.copytree(made / "scores", tmp_path / "scores")
    manifest = tmp_path / "scores" / "deep" / "seed0" / "knn" / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ManifestError, match="not valid JSON"):
        report_runs(runs(made), [tmp_path / "scores"], [], out=tmp_path / "out", report=Silent())
    with pytest.raises(SourceError, match="no such folder"):
        report_runs(runs(made), [tmp_path / "typo"], [], out=tmp_path / "out", report=Silent())


def test_out_may_not_be_a_file(made, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(BadInputError, match="this is a file"):
        report_runs(runs(made), [], [], out=tmp_path / "out", report=Silent())


def test_the_command(made, target_root, tmp_path):
    arguments = ["report", *map(str, runs(made)[:2]), "--out", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--scores", str(made / "scores"), "--targets", str(target_root)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "seed0 and 1 more" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert missing.exit_code == 2
