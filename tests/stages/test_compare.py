"""Many runs side by side: what is expanded, what is done, what is not done twice, what the report says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.artifacts.parts import Part
from cae2pipe.cli import app
from cae2pipe.config.base import build, load, preset_names
from cae2pipe.config.compare import GridSettings
from cae2pipe.errors import SettingsError
from cae2pipe.progress import Silent
from cae2pipe.reporting.comparison import Comparison, Row, comparison_html, comparison_markdown, findings
from cae2pipe.stages import compare as stage
from cae2pipe.stages.compare import compare, expand
from tests.conftest import contents, snapshot

GRID = {
    "title": "Losses <both>",
    "config": "default",
    "set": {
        "epochs": 1,
        "model": {
            "width": 32, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8, "drop_path": 0.0,
            "regressor_depth": 1, "regressor_width": 32, "regressor_heads": 2,
        },
        "mask": {"ratio": 0.4},
        "optimizer": {"warmup_epochs": 0},
        "data": {"batch": 32, "streams": 4, "window": 2},
    },
    "seeds": [0, 1],
    "variants": [
        {"name": "masked alone", "set": {"loss": {"visible": 0.0}}, "paper": {"knn": 78.4}},
        {"name": "both", "paper": {"knn": 80.7}},
    ],
    "evaluate": [{"kind": "knn", "set": {"k": 5}}],
}  # fmt: skip
SPEED = {"workers": 0, "device": "cpu"}


@pytest.fixture
def data(photos, tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to(photos)
    return tmp_path / "data"


def grid(**over) -> GridSettings:
    return build(GridSettings, {**GRID, **over}, "test")


def test_every_preset_is_valid_at_both_scales():
    for name in preset_names("compare"):
        settings = load(GridSettings, "compare", name)
        for small in (False, True):
            runs = expand(settings, small, {})
            assert len({run.name for run in runs}) == len(runs) == len(settings.variants) * len(settings.seeds)
            assert all((run.settings.model.width == 96) is small for run in runs)


def test_all_of_a_seed_come_before_the_next():
    runs = expand(grid(), False, SPEED)
    assert [run.name for run in runs] == ["masked-alone-s0", "both-s0", "masked-alone-s1", "both-s1"]
    assert [run.settings.loss.visible for run in runs] == [0, 1, 0, 1]
    assert {run.settings.speed.workers for run in runs} == {0}
    assert expand(grid(small={"epochs": 7}), True, {})[0].settings.epochs == 7


def test_a_kill_in_the_middle_and_the_same_command_finishes_without_redoing(target_root, data, tmp_path, monkeypatch):
    out, real, trained = tmp_path / "out", stage.pretrain, []

    class Killed(BaseException):
        pass

    def killed(targets, folder, settings, report):
        if len(trained) == 2:
            raise Killed
        trained.append(folder.name)
        return real(targets, folder, settings, report)

    monkeypatch.setattr(stage, "pretrain", killed)
    with pytest.raises(Killed):
        compare(grid(), target_root, data, out, Silent(), speed=SPEED)
    before = snapshot(out / "runs")
    monkeypatch.setattr(stage, "pretrain", real)
    found = compare(grid(), target_root, data, out, Silent(), speed=SPEED)
    after = snapshot(out / "runs")
    assert before.items() <= after.items()
    assert (found.done, found.wanted) == (4, 4)
    assert [len(row.scores["knn"]) for row in found.rows] == [2, 2]
    text = (out / "report.md").read_text()
    assert "| both |" in text
    assert "knn: the paper's order, both > masked alone," in text
    page = (out / "report.html").read_text()
    assert "Losses &lt;both&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    again = compare(grid(), target_root, data, out, Silent(), speed=SPEED)
    assert again == found
    assert snapshot(out / "runs") == after


def test_parts_share_the_runs_and_the_last_one_reports_all(target_root, data, tmp_path):
    first = compare(grid(), target_root, data, tmp_path / "out", Silent(), part=Part(1, 2), speed=SPEED)
    assert first.done == 2
    assert "–" in (tmp_path / "out" / "report.md").read_text()
    second = compare(grid(), target_root, data, tmp_path / "out", Silent(), part=Part(2, 2), speed=SPEED)
    assert second.done == 4


def test_the_command(target_root, data, tmp_path):
    import yaml

    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "seeds": 0}))
    arguments = ["compare", str(path), str(target_root), str(data), str(tmp_path / "out"), "--workers", "0"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "masked alone" in done.stdout
    wrong = CliRunner().invoke(app, [*arguments, "--set", "variants=[]"])
    assert wrong.exit_code == 2


def test_jobs_give_what_one_process_gives(target_root, data, tmp_path):
    import yaml

    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID))
    arguments = ["compare", str(path), str(target_root), str(data), "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "two"), "--jobs", "2"])
    assert done.exit_code == 0, done.output
    compare(grid(), target_root, data, tmp_path / "one", Silent(), speed=SPEED)
    one, two = (
        {name: content for name, content in contents(tmp_path / out).items() if name.endswith("encoder.safetensors")}
        for out in ("one", "two")
    )
    assert one == two
    assert len(one) == 4
    refused = CliRunner().invoke(app, [*arguments, str(tmp_path / "two"), "--jobs", "2", "--part", "1/2"])
    assert refused.exit_code == 2


def test_a_job_that_fails_says_so(target_root, data, tmp_path):
    import yaml

    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "evaluate": [{"kind": "knn", "set": {"k": 5000}}]}))
    arguments = ["compare", str(path), str(target_root), str(data), str(tmp_path / "out"), "--workers", "0"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--jobs", "2"])
    assert done.exit_code == 1
    assert "2 of 2 processes failed: 1, 2" in done.stderr


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"variants": [{"name": "a b"}, {"name": "A-b"}]}, "two variants are called 'a-b'"),
        ({"seeds": [1, 1]}, "each once"),
        ({"evaluate": [{"kind": "knn"}, {"kind": "knn"}]}, "each once"),
        ({"variants": [{"name": "x", "sett": {}}]}, "unknown setting"),
    ],
)
def test_grids_that_cannot_be_meant(over, message):
    with pytest.raises(SettingsError, match=message):
        grid(**over)


def test_a_variant_whose_settings_do_not_fit_is_refused_before_anything_runs(target_root, data, tmp_path):
    odd = [*GRID["variants"], {"name": "odd", "set": {"loss": {"kin": "mse"}}}]
    with pytest.raises(SettingsError, match=r"loss\.kin"):
        compare(grid(variants=odd), target_root, data, tmp_path / "out", Silent(), speed=SPEED)
    assert not (tmp_path / "out").exists()


def test_the_report_says_where_the_papers_order_does_not_hold():
    rows = [
        Row("a", {"linear": [0.5, 0.6]}, {"linear": 70.0}, [1.0, 0.5], [60.0]),
        Row("b", {"linear": [0.4]}, {"linear": 75.0}, [], []),
        Row("c", {"linear": []}, {}, [], []),
    ]
    found = Comparison("T", "", ["linear"], rows, {"linear": "p"}, 2, 3, 6)
    assert findings(found) == ["linear: the paper's order, b > a, does not hold: here a > b."]
    text = comparison_markdown(found)
    assert "| a | 55.0 ± 7.1 | 70.0 | 0.500 | 1.0 |" in text
    assert "| c | – | – | – | – |" in text
    assert "<svg" in comparison_html(found)
