"""Tables of scores, from outputs of evaluations."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.artifacts.manifest import seal
from cae2pipe.cli import app
from cae2pipe.comparison.scores import COLUMNS, collect, headlines, row, score_artifacts
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import EVALUATIONS
from cae2pipe.errors import ManifestError, SourceError
from cae2pipe.reporting.results import as_markdown, escaped
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from tests.conftest import write_photos

SET = {"knn": ["k=[5]"], "linear": ["cached_crops=1", "epochs=2", "warmup_epochs=1"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory, trained_run) -> Path:
    """Three finished evaluations at different depths, one that was stopped, and a run."""
    root = tmp_path_factory.mktemp("scores")
    data = root / "data"
    for part in ("train", "val"):
        write_photos(data / part, classes=3, each=4, seed=len(part))
    run = trained_run()

    def score(kind, spec, out):
        settings = load(
            EVALUATIONS[kind], "evaluate", kind, overrides=[*SET[kind], "speed.workers=0", "speed.device=cpu"]
        )
        evaluate(kind, str(spec), data, out=root / "scores" / out, settings=settings, report=Silent())

    score("knn", run, "a")
    score("knn", f"random:{run}", "b/deep")
    score("linear", run, "a")
    shutil.copytree(run, root / "scores" / "d")
    return root / "scores"


@pytest.fixture
def scores(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "scores"))


def test_every_finished_score_the_best_first(made):
    rows = collect([made])
    results = [json.loads(path.read_text()) for path in made.rglob("result.json")]
    wanted = sorted((found["evaluation"], -found["top1"]) for found in results)
    assert [(row["evaluation"], -row["score"]) for row in rows] == wanted
    assert {row["encoder"] for row in rows} == {found["encoder"] for found in results}
    assert rows[0]["train"] == 12
    assert all(tuple(row) == (*COLUMNS, "metric") for row in rows)


def test_manifests_of_others_are_passed_over(scores):
    (scores / "web").mkdir()
    (scores / "web" / "manifest.json").write_text('{"name": "app"}')
    assert len(collect([scores])) == 3


def with_result(**changes):
    """As a manifest would be written by someone who also fixes its digest."""

    def change(text):
        manifest = json.loads(text)
        return seal({**manifest, "result": {**manifest["result"], **changes}}).decode()

    return change


DAMAGED = {
    "cut off": lambda text: text[:-50],
    "not UTF-8": lambda text: text.replace("knn", "kn\udcff", 1),
    "an evaluation's name": with_result(evaluation=3),
    "a score": with_result(top1="0.5"),
    "images": with_result(images={"train": 3}),
    "a fifo": None,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_named_and_the_others_are_shown(damage, scores):
    path = scores / "b" / "deep" / "knn" / "manifest.json"
    text = path.read_text()
    path.unlink()
    if change := DAMAGED[damage]:
        assert change(text) != text
        path.write_text(change(text), errors="surrogateescape")
    else:
        os.mkfifo(path)
    found = []
    assert len(collect([scores], found)) == 2
    assert [error.where for error in found] == [str(path)]
    with pytest.raises(ManifestError):
        collect([scores])


def test_a_folder_named_twice_counts_once(made):
    assert len(collect([made, made / "a", made / "a" / "knn"])) == 3


def test_markdown_holds_percent_and_no_stray_columns(made):
    rows = collect([made / "a"])
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 7
    assert f"| top-1 {100 * rows[0]['score']:.1f} |  | " in lines[2]
    assert {line.replace("\\|", "").count("|") for line in lines[:4]} == {len(COLUMNS) + 1}
    assert lines[4:] == ["", *(f"{n}. {escaped(row['protocol'])}" for n, row in enumerate(rows, 1))]


def test_top_5_is_shown_if_there_are_more_than_five_classes(made):
    folder, _, result = next(score_artifacts([made]))
    assert row(result, folder)["also"] == {}
    many = result.model_copy(update={"classes": 6})
    assert row(many, folder)["also"] == {"top5": result.figure("top5")}
    assert "top-5 100.0" in as_markdown([row(many, folder)])
    assert headlines("segment", 3) == ("miou", "pixel_accuracy")


@pytest.mark.parametrize(("folder", "what"), [("nowhere", "no such folder"), ("d", "no finished evaluation")])
def test_nothing_to_show_is_an_error(made, folder, what):
    with pytest.raises(SourceError, match=what):
        collect([made / folder])


def test_the_command(scores):
    def run(*arguments):
        return CliRunner().invoke(app, ["results", str(scores), *arguments], env={"COLUMNS": "200"})

    best = 100 * collect([scores])[0]["score"]
    assert f"{best:.1f}" in run().stdout
    assert run("--format", "markdown").stdout.startswith("| encoder |")
    assert len(json.loads(run("--format", "json").stdout)) == 3
    refused = CliRunner().invoke(app, ["results", str(scores / "nowhere")])
    assert refused.exit_code == 2
    (scores / "a" / "knn" / "manifest.json").write_text("{")
    damaged = run("--format", "json")
    assert damaged.exit_code == 1
    assert len(json.loads(damaged.stdout)) == 2
    assert str(scores / "a" / "knn" / "manifest.json") in damaged.stderr
