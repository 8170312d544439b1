import json

import pytest
from typer.testing import CliRunner

from cae2pipe.artifacts.box import Box
from cae2pipe.cli import app
from cae2pipe.errors import ManifestError, SourceError
from cae2pipe.reporting.results import COLUMNS, as_markdown, collect


@pytest.fixture
def scores(tmp_path):
    """Three finished evaluations at different depths, one that is not, and a folder of another kind."""

    def score(folder, encoder, kind, top1):
        result = {
            "evaluation": kind,
            "encoder": encoder,
            "feature": "class",
            "top1": top1,
            "top5": 0.9,
            "protocol": "k 20 | one crop",
            "images": {"train": 100, "val": 10},
        }
        Box(tmp_path / folder, "scores", {"x": folder}, facts={"result": result}).save(complete=True)

    score("a/knn", "base", "knn", 0.5)
    score("b/deep/knn", "teacher:clip-b16", "knn", 0.75)
    score("a/linear", "base", "linear", 0.6)
    Box(tmp_path / "c" / "knn", "scores", {"x": "c"}, facts={}).save()
    Box(tmp_path / "d", "run", {"x": "d"}, facts={}).save(complete=True)
    return tmp_path


def test_every_finished_score_the_best_first(scores):
    rows = collect([scores])
    assert [(row["evaluation"], row["encoder"], row["score"]) for row in rows] == [
        ("knn", "teacher:clip-b16", 0.75),
        ("knn", "base", 0.5),
        ("linear", "base", 0.6),
    ]
    assert rows[0]["train"] == 100
    assert all(tuple(row) == (*COLUMNS, "metric") for row in rows)


def test_manifests_of_others_are_passed_over_and_broken_ones_are_not(scores):
    (scores / "web").mkdir()
    (scores / "web" / "manifest.json").write_text('{"name": "app"}')
    assert len(collect([scores])) == 3
    (scores / "web" / "manifest.json").write_text('{"name": ')
    with pytest.raises(ManifestError, match="not valid JSON"):
        collect([scores])


def test_a_folder_named_twice_counts_once(scores):
    assert len(collect([scores, scores / "a", scores / "a" / "knn"])) == 3


def test_markdown_holds_percent_and_no_stray_columns(scores):
    lines = as_markdown(collect([scores / "a"])).splitlines()
    assert len(lines) == 6
    assert "| top-1 50.0 | top-5 90.0 |" in lines[2]
    assert {line.replace("\\|", "").count("|") for line in lines[:4]} == {len(COLUMNS) + 1}
    assert lines[4:] == ["", "1. k 20 \\| one crop"]


@pytest.mark.parametrize(("folder", "what"), [("nowhere", "no such folder"), ("d", "no finished evaluation")])
def test_nothing_to_show_is_an_error(scores, folder, what):
    with pytest.raises(SourceError, match=what):
        collect([scores / folder])


def test_the_command(scores):
    run = CliRunner().invoke
    assert "75.0" in run(app, ["results", str(scores)], env={"COLUMNS": "200"}).stdout
    assert run(app, ["results", str(scores), "--format", "markdown"]).stdout.startswith("| encoder |")
    assert len(json.loads(run(app, ["results", str(scores), "--format", "json"]).stdout)) == 3
    refused = run(app, ["results", str(scores / "nowhere")])
    assert refused.exit_code == 2
