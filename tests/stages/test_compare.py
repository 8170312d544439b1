"""Many runs side by side: what is expanded, what is done, what is not done twice, what the report says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.artifacts.parts import Part
from cae2pipe.cli import app
from cae2pipe.config.base import build, load, preset_names
from cae2pipe.config.compare import GridSettings
from cae2pipe.errors import BadInputError, SettingsError
from cae2pipe.progress import Silent
from cae2pipe.stages import compare as stage
from cae2pipe.stages.compare import compare, expand
from cae2pipe.stages.extract_targets import extract_targets
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
            runs = expand(settings, "targets", small, {})
            assert len({run.name for run in runs}) == len(runs) == len(settings.variants) * len(settings.seeds)
            assert all((run.settings.model.width == 96) is small for run in runs)


def test_the_papers_grids_share_runs():
    def names(preset: str, targets: str = "targets") -> set[str]:
        return {run.name for run in expand(load(GridSettings, "compare", preset), targets, False, {})}

    default = set.intersection(*(names(f"table{number}") for number in range(1, 6)), names("figure3"))
    assert len(default) == 3
    assert default <= names("rivals") & names("figure2") & names("fidelity")
    assert not names("table2") & names("table2", "other targets")


def test_all_of_a_seed_come_before_the_next():
    runs = expand(grid(), "targets", False, SPEED)
    assert [(run.variant, run.seed) for run in runs] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [run.settings.loss.visible for run in runs] == [0, 1, 0, 1]
    assert {run.settings.speed.workers for run in runs} == {0}
    assert [run.name[:9] for run in runs] == ["caev2-s0-", "caev2-s0-", "caev2-s1-", "caev2-s1-"]


def test_a_variants_own_small_scale_is_laid_over_its_settings():
    variants = [{"name": "a", "set": {"epochs": 9}}, {"name": "b", "set": {"epochs": 9}, "small": {"epochs": 3}}]
    small = grid(variants=variants, small={"epochs": 7, "mask": {"ratio": 0.6}}, seeds=[0])
    assert [run.settings.epochs for run in expand(small, "t", False, {})] == [9, 9]
    runs = expand(small, "t", True, {})
    assert [run.settings.epochs for run in runs] == [9, 3]
    assert {run.settings.mask.ratio for run in runs} == {0.6}


def test_what_only_changes_speed_leaves_names_as_they_are():
    one, two = (expand(grid(), "targets", False, speed) for speed in ({}, SPEED))
    assert [run.name for run in one] == [run.name for run in two]


def test_another_codec_is_another_run():
    variants = [{"name": "a"}, {"name": "b", "codec": {"name": "klt"}}, {"name": "c", "codec": {"name": "int8"}}]
    assert len({run.name for run in expand(grid(variants=variants, seeds=0), "targets", False, {})}) == 3


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
        compare(grid(), "losses", target_root, data, out, Silent(), speed=SPEED)
    before = snapshot(out / "runs")
    monkeypatch.setattr(stage, "pretrain", real)
    found = compare(grid(), "losses", target_root, data, out, Silent(), speed=SPEED)
    after = snapshot(out / "runs")
    assert before.items() <= after.items()
    assert (found.done, found.wanted) == (4, 4)
    assert [len(row.scores["knn"]) for row in found.rows] == [2, 2]
    folder = out / "reports" / "losses"
    text = (folder / "report.md").read_text()
    assert "| both |" in text
    assert "knn: the paper's order, both > masked alone," in text
    page = (folder / "report.html").read_text()
    assert "Losses &lt;both&gt;" in page
    assert "http" not in page
    assert page.count("Latents of both as colours") == 4
    pages = contents(folder)
    again = compare(grid(), "losses", target_root, data, out, Silent(), speed=SPEED)
    assert again == found
    assert snapshot(out / "runs") == after
    assert contents(folder) == pages


def test_two_grids_in_one_folder_train_what_they_share_once(target_root, data, tmp_path, monkeypatch):
    out, trained = tmp_path / "out", []
    real = stage.pretrain
    monkeypatch.setattr(stage, "pretrain", lambda t, folder, s, r: trained.append(folder.name) or real(t, folder, s, r))
    compare(grid(seeds=0), "one", target_root, data, out, Silent(), speed=SPEED)
    alike = [{"name": "the same"}, {"name": "twice"}, {"name": "MSE", "set": {"loss": {"kind": "mse"}}}]
    found = compare(grid(variants=alike, seeds=0), "two", target_root, data, out, Silent(), speed=SPEED)
    assert len(trained) == 4
    assert len(set(trained)) == len(list((out / "runs").iterdir())) == 3
    assert found.rows[0].scores == found.rows[1].scores
    assert {path.name for path in (out / "reports").iterdir()} == {"one", "two"}


def test_parts_share_the_runs_and_the_last_one_reports_all(target_root, data, tmp_path):
    out = tmp_path / "out"
    first = compare(grid(), "losses", target_root, data, out, Silent(), part=Part(1, 2), speed=SPEED)
    assert first.done == 2
    assert "–" in (out / "reports" / "losses" / "report.md").read_text()
    second = compare(grid(), "losses", target_root, data, out, Silent(), part=Part(2, 2), speed=SPEED)
    assert second.done == 4


def test_codecs_are_compared_on_recoded_sets(photos, extract_settings, data, tmp_path):
    extract_targets(photos, tmp_path / "fp16", extract_settings(codec={"name": "fp16"}), Silent())
    variants = [{"name": "small", "codec": {"name": "klt", "fidelity": 0.9}}, {"name": "fp16"}]
    out = tmp_path / "out"
    codecs = grid(variants=variants, seeds=0, along="bytes")
    found = compare(codecs, "codecs", tmp_path / "fp16", data, out, Silent(), speed=SPEED)
    assert [path.name for path in (out / "targets").iterdir() if path.name != ".locks"] == ["klt-0.9"]
    small, whole = found.rows
    assert small.latents < whole.latents
    assert (small.along, whole.along) == (small.latents, whole.latents)
    assert "stored latents, bytes a view" in (out / "reports" / "codecs" / "report.html").read_text()
    again = compare(codecs, "codecs", tmp_path / "fp16", data, out, Silent(), speed=SPEED)
    assert again == found
    with pytest.raises(BadInputError, match="error would come on top"):
        compare(codecs, "again", out / "targets" / "klt-0.9", data, tmp_path / "other", Silent(), speed=SPEED)


def test_the_command(target_root, data, tmp_path):
    import yaml

    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "seeds": 0}))
    arguments = ["compare", str(path), str(target_root), str(data), str(tmp_path / "out"), "--workers", "0"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "masked alone" in done.stdout
    assert (tmp_path / "out" / "reports" / "grid" / "report.html").is_file()
    assert "report.html" in done.stdout
    wrong = CliRunner().invoke(app, [*arguments, "--set", "variants=[]"])
    assert wrong.exit_code == 2


def test_jobs_give_what_one_process_gives(target_root, data, tmp_path):
    import yaml

    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID))
    arguments = ["compare", str(path), str(target_root), str(data), "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "two"), "--jobs", "2"])
    assert done.exit_code == 0, done.output
    compare(grid(), "grid", target_root, data, tmp_path / "one", Silent(), speed=SPEED)
    one, two = (
        {name: content for name, content in contents(tmp_path / out).items() if name.endswith("encoder.safetensors")}
        for out in ("one", "two")
    )
    assert one == two
    assert len(one) == 4
    refused = CliRunner().invoke(app, [*arguments, str(tmp_path / "two"), "--jobs", "2", "--part", "1/2"])
    assert refused.exit_code == 2


def test_processes_of_torchrun_share_every_run(target_root, data, tmp_path):
    import yaml

    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "seeds": 0}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "cae2pipe", "compare", path, target_root, data, tmp_path / "two", "--workers", "0"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    # Told once, by the leading process.
    assert done.stdout.count("report.html") == 1
    one = compare(grid(seeds=0), "grid", target_root, data, tmp_path / "one", Silent(), speed=SPEED)
    assert f"{one.done} of {one.wanted} scores" in done.stderr
    for run in (tmp_path / "one" / "runs").iterdir():
        lines = [
            json.loads((tmp_path / n / "runs" / run.name / "metrics.jsonl").read_text().splitlines()[-1])
            for n in ("one", "two")
        ]
        assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-4)
        assert [line["devices"] for line in lines] == [1, 2]


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
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants are called 'a'"),
        ({"seeds": [1, 1]}, "each once"),
        ({"evaluate": [{"kind": "knn"}, {"kind": "knn"}]}, "each once"),
        ({"variants": [{"name": "x", "sett": {}}]}, "unknown setting"),
        ({"along": "mask.ration"}, "no pretraining setting 'mask.ration'"),
        ({"along": "mask.ratio.x"}, "no pretraining setting"),
    ],
)
def test_grids_that_cannot_be_meant(over, message):
    with pytest.raises(SettingsError, match=message):
        grid(**over)


def test_a_variant_whose_settings_do_not_fit_is_refused_before_anything_runs(target_root, data, tmp_path):
    odd = [*GRID["variants"], {"name": "odd", "set": {"loss": {"kin": "mse"}}}]
    with pytest.raises(SettingsError, match=r"loss\.kin"):
        compare(grid(variants=odd), "odd", target_root, data, tmp_path / "out", Silent(), speed=SPEED)
    assert not (tmp_path / "out").exists()
