"""The benchmark of views, on noise: new runs, reused runs, output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import view_arms, views
from benchmarks.view_scores import kept_epochs, standard_error, training_losses
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import FAST_RATES, KnnSettings, LinearSettings
from cae2pipe.errors import LockedError, MismatchError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from tests.conftest import snapshot

pytestmark = pytest.mark.filterwarnings("ignore:CAE2PIPE_REAL")
ARMS = "v1-s0,v2-k90-s0"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


@pytest.fixture
def measure(work, tmp_path, monkeypatch):
    """Run the script with options on noise; returns the result it has written."""

    def run(*options: str) -> dict:
        out = tmp_path / "result.json"
        arguments = ["views", "--quick", "--work", str(work), "--epochs", "2", "--out", str(out)]
        monkeypatch.delenv("CAE2PIPE_REAL", raising=False)
        monkeypatch.setattr(sys, "argv", [*arguments, *options])
        views.main()
        return json.loads(out.read_text())

    return run


@pytest.fixture
def bench(work: Path) -> view_arms.Bench:
    return view_arms.Bench(work, work / "images", 48, 2, 1, 2, "cpu", True)


def test_arms_are_trained_scored_and_then_adopted(measure, bench, work, tmp_path, monkeypatch):
    picture = tmp_path / "views.png"
    first = measure("--arms", ARMS, "--linear", "2", "--picture", str(picture), "--pixels-once", "3")
    rows = {(row["arm"], row["epoch"]): row for row in first["rows"]}
    assert list(rows) == [("v1-s0", 1), ("v1-s0", 2), ("v2-k90-s0", 1), ("v2-k90-s0", 2)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    for (_, epoch), row in rows.items():
        assert (row["linear"] is None) == (epoch == 1)
        # A cosine loss of visible and masked tokens together.
        assert 0 < row["held_out_loss"] < 2.1
    one, two = rows["v1-s0", 2], rows["v2-k90-s0", 2]
    assert (two["views"], two["fidelity"], two["seed"]) == (2, 0.9, 0)
    assert one["kb_per_image"] < two["kb_per_image"] < 2 * one["kb_per_image"]
    assert 0 < one["kb_latents"] < one["kb_per_image"]
    assert one["kb_pixels_once"] == pytest.approx(one["kb_latents"] + 3)
    assert one["held_out_loss"] < rows["v1-s0", 1]["held_out_loss"]
    # As the library itself scores the run that is finished.
    linear = load(LinearSettings, "evaluate", "linear", overrides=["cached_crops=1", f"sweep={list(FAST_RATES)}"])
    for kind, settings in (("knn", load(KnnSettings, "evaluate", "knn", overrides=["k=20"])), ("linear", linear)):
        result = evaluate(
            kind, str(work / "runs" / "v1-s0"), bench.data, out=tmp_path / kind, settings=settings, report=Silent()
        )
        assert result["feature"] == "class"
        assert one[kind] == pytest.approx(100 * result["top1"], abs=0.01)

    monkeypatch.setattr(view_arms, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    before = snapshot(work)
    again = measure("--only-score", "--arms", ARMS + ",fresh-s0", "--linear", "2", "--pixels-once", "3")
    assert again["rows"] == first["rows"]
    assert snapshot(work) == before


def test_arms_of_another_device_are_drawn_too(measure, tmp_path):
    rows = measure("--arms", ARMS)["rows"]
    own = [row for row in rows if row["arm"] == "v1-s0"]
    others = views.rows_of_other_arms(tmp_path / "result.json", own)
    assert others == [row for row in rows if row["arm"] == "v2-k90-s0"] != []
    assert views.rows_of_other_arms(None, own) == []


def test_a_run_of_another_process_is_scored_as_far_as_it_is(measure, bench, work, monkeypatch):
    def locked(*_, **__):
        raise LockedError("another process is writing this folder")

    measure("--arms", "v1-s0")
    monkeypatch.setattr(view_arms, "pretrain", locked)
    last = sorted((bench.work / "runs" / "v1-s0" / "checkpoints").iterdir())[-1]
    data = last.read_bytes()
    last.unlink()
    (work / "scores" / "v1-s0.json").unlink()

    def epochs() -> list[int]:
        return [row["epoch"] for row in measure("--arms", "v1-s0,v2-s0")["rows"] if row["arm"] != "v2-k90-s0"]

    assert epochs() == [1]
    last.write_bytes(data)
    assert epochs() == [1, 2]


def test_arms_that_are_not_asked_for_keep_their_rows(measure, bench, work):
    both = measure("--arms", ARMS)["rows"]
    assert measure("--arms", "v2-k90-s0")["rows"] == both
    # Scores of another run are not used for this one, and names that are not arms are ignored.
    one, two, other = (work / "scores" / f"{name}.json" for name in ("v1-s0", "v2-k90-s0", "v9-s0"))
    two.write_bytes(one.read_bytes())
    other.write_bytes(one.read_bytes())
    again = measure("--arms", "v2-k90-s0")["rows"]
    other.unlink()
    assert [{**row, "linear": None} for row in again] == [{**row, "linear": None} for row in both]


def test_a_run_of_other_settings_is_refused(measure):
    measure("--arms", "v1-s0")
    for more in ([], ["--only-score"]):
        with pytest.raises(MismatchError, match=r"settings\.epochs = 2"):
            measure("--arms", "v1-s0", "--epochs", "3", *more)


def test_arms_by_name(bench):
    full = view_arms.Bench(Path("work"), Path("data"), 112, 200, 20, 32, "cpu", False)
    arms = {name: view_arms.parse_arm(name, full) for name in views.ARMS.split(",")}
    assert arms["v8-s1"] == view_arms.Arm("v8-s1", "k999", 8, 0.999, 1)
    assert arms["v32-k97-s0"] == view_arms.Arm("v32-k97-s0", "k97", 32, 0.97, 0)
    assert arms["fresh-s1"] == view_arms.Arm("fresh-s1", "fresh", 200, 0.999, 1)
    for wrong in ("v3-s0", "v0-s0", "v2", "online-s0", "v2-k90-s0x"):
        with pytest.raises(SystemExit, match=wrong):
            view_arms.parse_arm(wrong, bench)


def test_epochs_that_are_kept_for_good_and_their_training_loss(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (20, 40, 41, 60, 62):
        (tmp_path / "checkpoints" / f"step-{step:08d}.pt").touch()
    assert kept_epochs(tmp_path, steps=10, every=2) == [2, 4, 6]
    assert kept_epochs(tmp_path, steps=10, every=4) == [4]
    lines = [(0, 3.0, 64), (0, 1.0, 32), (1, 0.5, 64)]
    text = [json.dumps({"step": n, "epoch": e, "loss": loss, "images": i}) for n, (e, loss, i) in enumerate(lines)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    assert training_losses(tmp_path) == {1: pytest.approx((3 * 64 + 32) / 96), 2: 0.5}


def test_a_claim_is_checked_where_both_of_its_arms_are_there():
    def last(**scores: float):
        return {f"{arm}-s0": {"knn": score, "linear": None} for arm, score in scores.items()}

    assert views.checks_of(last(v32=60.0), 800, 32) == []
    near, far = (views.checks_of(last(v32=60.0, fresh=fresh), 800, 32) for fresh in (62.0, 66.0))
    assert [check["ok"] for check in (*near, *far)] == [True, False]
    # 1.73 points are one standard error of 60% on 800 images, 2.4 of the difference of two such.
    assert standard_error(60, 800) == pytest.approx(1.732, abs=1e-3)
    assert near[0]["value"] == pytest.approx(2 / 2.438, abs=0.01)
