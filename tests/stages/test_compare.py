"""Comparisons of many runs: expansion of the grid, work done, work skipped, content of the report."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.api.comparisons import report_name
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.cli import app
from cae2pipe.config.base import build, load, preset_names
from cae2pipe.config.compare import GridSettings, for_sets
from cae2pipe.errors import BadInputError, DivergedError, SettingsError
from cae2pipe.evaluation.grid_plan import expand, plan_grid, run_name, weighted
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import compare as stage
from cae2pipe.stages.compare import compare
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet
from tests import ranks
from tests.conftest import contents, snapshot

GRID = {
    "title": "Losses <both>",
    "config": "default",
    "set": {
        "epochs": 1,
        "model": {
            "width": 32, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8, "drop_path": 0.0,
            "predictor_depth": 1, "predictor_width": 32, "predictor_heads": 2,
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


def names(found: GridSettings, targets: str = "targets", small: bool = False) -> list[str]:
    """The names of its runs; of a grid that has rows for each target set, on two of them."""
    labels = [targets, "another"] if any(variant.repeated for variant in found.variants) else [targets]
    found = for_sets(found, labels)
    made = []
    for place, settings in expand(found, small, {}):
        own = [labels[position - 1] for position in found.variants[place].sets]
        settings = weighted(settings, found.variants[place], own)
        made.append(run_name(settings, own, found.variants[place].codec))
    return made


def test_every_preset_is_valid_at_both_scales():
    for preset in preset_names("compare"):
        settings = load(GridSettings, "compare", preset)
        for small in (False, True):
            found = names(settings, small=small)
            variants = 5 if preset == "teachers" else len(settings.variants)
            assert len(set(found)) == len(found) == variants * len(settings.seeds)
            assert all((run.model.width == 96) is small for _, run in expand(settings, small, {}))
            # A variant's own decoder does not go into the small scale.
            assert not small or {run.model.predictor_width for _, run in expand(settings, small, {})} == {96}


def test_the_papers_grids_share_runs():
    presets = {preset: set(names(load(GridSettings, "compare", preset))) for preset in preset_names("compare")}
    default = set.intersection(*(presets[f"table{number}"] for number in range(1, 6)), presets["figure3"])
    assert len(default) == 3
    assert default <= presets["rivals"] & presets["figure2"] & presets["fidelity"]
    assert not presets["table2"] & set(names(load(GridSettings, "compare", "table2"), "other targets"))


def test_all_of_a_seed_come_before_the_next():
    runs = expand(grid(), False, SPEED)
    assert [(place, run.seed) for place, run in runs] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [run.loss.visible for _, run in runs] == [0, 1, 0, 1]
    assert {run.speed.workers for _, run in runs} == {0}
    assert [name[:9] for name in names(grid())] == ["caev2-s0-", "caev2-s0-", "caev2-s1-", "caev2-s1-"]


def test_a_variants_own_small_scale_is_laid_over_its_settings():
    variants = [{"name": "a", "set": {"epochs": 9}}, {"name": "b", "set": {"epochs": 9}, "small": {"epochs": 3}}]
    small = grid(variants=variants, small={"epochs": 7, "mask": {"ratio": 0.6}}, seeds=[0])
    assert [run.epochs for _, run in expand(small, False, {})] == [9, 9]
    runs = [run for _, run in expand(small, True, {})]
    assert [run.epochs for run in runs] == [9, 3]
    assert {run.mask.ratio for run in runs} == {0.6}


def test_what_only_changes_speed_leaves_names_as_they_are():
    slow, fast = (run_name(expand(grid(), False, speed)[0][1], "targets", None) for speed in ({}, SPEED))
    assert slow == fast


def test_another_codec_is_another_run():
    variants = [{"name": "a"}, {"name": "b", "codec": {"name": "klt"}}, {"name": "c", "codec": {"name": "int8"}}]
    assert len(set(names(grid(variants=variants, seeds=0)))) == 3


def test_a_kill_in_the_middle_and_the_same_command_finishes_without_redoing(target_root, data, tmp_path, monkeypatch):
    out, real, trained = tmp_path / "out", stage.pretrain, []

    class Killed(BaseException):
        pass

    def killed(targets, folder, settings, **named):
        if len(trained) == 2:
            raise Killed
        trained.append(folder.name)
        return real(targets, folder, settings, **named)

    monkeypatch.setattr(stage, "pretrain", killed)
    with pytest.raises(Killed):
        compare(grid(), "losses", target_root, data=data, out=out, report=Silent(), speed=SPEED)
    before = snapshot(out / "runs")
    monkeypatch.setattr(stage, "pretrain", real)
    found = compare(grid(), "losses", target_root, data=data, out=out, report=Silent(), speed=SPEED)
    after = snapshot(out / "runs")
    assert before.items() <= after.items()
    assert (found.done, found.wanted) == (4, 4)
    assert [len(row.scores["knn"]) for row in found.rows] == [2, 2]
    folder = out / "reports" / "losses"
    text = (folder / "report.md").read_text()
    assert "| both |" in text
    assert "knn: the paper's order, both \\> masked alone," in text
    page = (folder / "report.html").read_text()
    assert "Losses &lt;both&gt;" in page
    assert "http" not in page
    assert page.count("Latents of both as colours") == 4
    pages = contents(folder)
    again = compare(grid(), "losses", target_root, data=data, out=out, report=Silent(), speed=SPEED)
    assert again == found
    assert snapshot(out / "runs") == after
    assert contents(folder) == pages


def test_two_grids_in_one_folder_train_what_they_share_once(target_root, data, tmp_path, monkeypatch):
    out, trained = tmp_path / "out", []
    real = stage.pretrain
    monkeypatch.setattr(
        stage, "pretrain", lambda t, folder, s, **r: trained.append(folder.name) or real(t, folder, s, **r)
    )
    compare(grid(seeds=0), "one", target_root, data=data, out=out, report=Silent(), speed=SPEED)
    alike = [{"name": "the same"}, {"name": "twice"}, {"name": "MSE", "set": {"loss": {"kind": "mse"}}}]
    found = compare(grid(variants=alike, seeds=0), "two", target_root, data=data, out=out, report=Silent(), speed=SPEED)
    assert len(trained) == 4
    assert len(set(trained)) == len(list((out / "runs").iterdir())) == 3
    assert found.rows[0].scores == found.rows[1].scores
    assert {path.name for path in (out / "reports").iterdir()} == {"one", "two", ".locks"}


def test_parts_share_the_runs_and_the_last_one_reports_all(target_root, data, tmp_path):
    out = tmp_path / "out"
    first = compare(
        grid(), "losses", target_root, data=data, out=out, report=Silent(), part=WorkShare(1, 2), speed=SPEED
    )
    assert first.done == 2
    assert "–" in (out / "reports" / "losses" / "report.md").read_text()
    second = compare(
        grid(), "losses", target_root, data=data, out=out, report=Silent(), part=WorkShare(2, 2), speed=SPEED
    )
    assert second.done == 4


def test_codecs_are_compared_on_recoded_sets(photos, extract_settings, data, tmp_path):
    extract_targets(photos, tmp_path / "fp16", extract_settings(codec={"name": "fp16"}), report=Silent())
    variants = [{"name": "small", "codec": {"name": "klt", "fidelity": 0.9}}, {"name": "fp16"}]
    out = tmp_path / "out"
    codecs = grid(variants=variants, seeds=0, along="bytes")
    found = compare(codecs, "codecs", tmp_path / "fp16", data=data, out=out, report=Silent(), speed=SPEED)
    (recoded,) = (path for path in (out / "targets").iterdir() if path.name != ".locks")
    assert recoded.name.startswith("klt-0.9-")
    small, whole = found.rows
    assert small.latents < whole.latents
    assert (small.along, whole.along) == (small.latents, whole.latents)
    assert "stored latents, kB per view" in (out / "reports" / "codecs" / "report.html").read_text()
    again = compare(codecs, "codecs", tmp_path / "fp16", data=data, out=out, report=Silent(), speed=SPEED)
    assert again == found
    with pytest.raises(BadInputError, match="error would be added"):
        compare(codecs, "again", recoded, data=data, out=tmp_path / "other", report=Silent(), speed=SPEED)


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
    compare(grid(), "grid", target_root, data=data, out=tmp_path / "one", report=Silent(), speed=SPEED)
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
    arguments = ["compare", path, target_root, data, tmp_path / "two", "--workers", "0", "--device", "cpu"]
    done = ranks.command(*arguments)
    assert done.codes == [0, 0], done.stderr
    # Logged once, by the leading process.
    assert done.stdout.count("report.html") == 1
    one = compare(grid(seeds=0), "grid", target_root, data=data, out=tmp_path / "one", report=Silent(), speed=SPEED)
    assert f"{one.done} of {one.wanted} scores" in done.stderr
    for run in (tmp_path / "one" / "runs").iterdir():
        lines = [
            json.loads((tmp_path / n / "runs" / run.name / "metrics.jsonl").read_text().splitlines()[-1])
            for n in ("one", "two")
        ]
        assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-4)
        assert [line["devices"] for line in lines] == [1, 2]


def test_a_job_that_fails_says_so(target_root, data, tmp_path, monkeypatch):
    import yaml

    # The test above starts jobs as users do; here they need not import everything again.
    context = ranks.imported()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "evaluate": [{"kind": "knn", "set": {"k": 5000}}], "seeds": 0}))
    arguments = ["compare", str(path), str(target_root), str(data), str(tmp_path / "out"), "--workers", "0"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--jobs", "2"])
    assert done.exit_code == 2
    assert "2 of 2 processes failed: 1, 2" in done.stderr
    # The results so far are reported anyway.
    assert "0 of 2 scores" in (tmp_path / "out" / "reports" / "grid" / "report.md").read_text()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants have the name 'a'"),
        ({"seeds": [1, 1]}, "must be non-empty and unique"),
        ({"evaluate": [{"kind": "knn"}, {"kind": "knn"}]}, "name each evaluation once"),
        ({"variants": [{"name": "x", "sett": {}}]}, "unknown setting"),
        ({"along": "mask.ration"}, "no pretraining setting 'mask.ration'"),
        ({"along": "mask.ratio.x"}, "no pretraining setting"),
        ({"along": "method"}, "method is no"),
        ({"evaluate": []}, "evaluate"),
        ({"set": {"seed": 3}}, "cannot set seed, which is set by `seeds`"),
        ({"variants": [{"name": "x", "set": {"stop_after": 1}}]}, "cannot be scored"),
        ({"variants": [{"name": "x\ny"}]}, "name"),
        ({"variants": [{"name": "x", "paper": {"liner": 80.0}}]}, "liner"),
    ],
)
def test_grids_that_cannot_be_meant(over, message):
    with pytest.raises(SettingsError, match=message):
        grid(**over)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"variants": [{"name": "odd", "set": {"loss": {"kin": "mse"}}}]}, r"(?s)loss\.kin.*variant 'odd'"),
        ({"variants": [{"name": "odd", "set": {"method": "cae2"}}]}, "unknown method 'cae2'"),
        (
            {"variants": [{"name": "odd", "set": {"method": "cae", "model": {"predictor_depth": 0}}}]},
            "needs a regressor",
        ),
        ({"variants": [{"name": "odd", "set": {"data": {"views": 9}}}]}, r"(?s)is 9, but.*--set set\.data\.views=2"),
        ({"evaluate": [{"kind": "knn", "set": {"kk": 3}}]}, "unknown setting 'kk'"),
        ({"evaluate": [{"kind": "linear", "set": {"epochs": 3}}]}, "epochs"),
        ({"variants": [{"name": "odd", "codec": {"name": "int8"}}]}, "error would be added"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(over, message, target_root, data, tmp_path):
    first = [GRID["variants"][0], *over.pop("variants", [])]
    with pytest.raises(BadInputError, match=message):
        compare(
            grid(variants=first, **over),
            "odd",
            target_root,
            data=data,
            out=tmp_path / "out",
            report=Silent(),
            speed=SPEED,
        )
    assert not (tmp_path / "out").exists()


def test_data_and_places_are_looked_at_first(target_root, data, tmp_path):
    for where, message in ((tmp_path / "nothing", "no such folder|does not exist|missing"),):
        with pytest.raises(BadInputError, match=message):
            plan_grid(grid(), target_root, where, out=tmp_path / "out")
    with pytest.raises(BadInputError, match="inside the target set"):
        plan_grid(grid(), target_root, data, out=target_root / "out")
    with pytest.raises(SettingsError, match="no small scale"):
        plan_grid(grid(), target_root, data, out=tmp_path / "out", small=True)


def test_every_run_knows_where_pixels_are_that_the_set_refers_to(
    target_root, data, extract_settings, second_file, tmp_path, monkeypatch
):
    second = extract_settings(teacher={"weights": str(second_file), "name": "second"}, views=1)
    extract_targets(target_root, tmp_path / "set", second, report=Silent(), by_reference=True)
    with pytest.raises(SettingsError, match="holds latents alone") as caught:
        plan_grid(grid(), tmp_path / "set", data, out=tmp_path / "out")
    assert "--set set.data.pixels=FOLDER" in caught.value.fix
    given = grid(set={**GRID["set"], "data": {**GRID["set"]["data"], "pixels": str(target_root)}})
    runs = plan_grid(given, tmp_path / "set", data, out=tmp_path / "out").runs
    assert {run.settings.data.pixels for run in runs} == {str(target_root)}
    # In Python an open set knows it.
    opened, taken = TargetSet(tmp_path / "set", pixels=target_root), []
    monkeypatch.setattr("cae2pipe.api.comparisons.run_compare", lambda settings, *_, **__: taken.append(settings))
    cae2pipe.compare(grid(), opened, data, out=tmp_path / "out", progress=False)
    runs = plan_grid(taken[0], opened.root, data, out=tmp_path / "out").runs
    assert {run.settings.data.pixels for run in runs} == {str(target_root)}
    # Sets that are compared have the same pixels.
    each = grid(variants=[{"name": "{each} alone", "sets": "each"}], seeds=0)
    plan = plan_grid(each, [target_root, tmp_path / "set"], data, out=tmp_path / "out")
    assert [run.settings.data.pixels for run in plan.runs] == [None, str(target_root)]
    assert {len(found.pixels(found.reader("v00/000000").block(0))) for found in plan.joined.sets} == {64}


def test_a_run_that_diverges_does_not_keep_others_from_being_made(target_root, data, tmp_path):
    wild = {"name": "wild", "set": {"optimizer": {"lr": 1e30, "scale_lr": False, "clip": 1e30}, "epochs": 3}}
    out = tmp_path / "out"
    with pytest.raises(DivergedError):
        compare(
            grid(variants=[wild, {"name": "good"}], seeds=0),
            "odd",
            target_root,
            data=data,
            out=out,
            report=Silent(),
            speed=SPEED,
        )
    text = (out / "reports" / "odd" / "report.md").read_text()
    assert "1 of 2 scores" in text
    assert "Not finished: wild, seed 0 (loss" in text
    assert "unfinished, epoch" in text


def test_other_scores_and_grown_targets_are_other_folders(photos, extract_settings, data, tmp_path):
    """One OUT for different evaluations, and for the same set with more views: nothing is mixed up."""
    extract_targets(photos, tmp_path / "set", extract_settings(views=1), report=Silent())
    one = grid(seeds=0, variants=[{"name": "both"}])
    out = tmp_path / "out"
    compare(one, "one", tmp_path / "set", data=data, out=out, report=Silent(), speed=SPEED)
    runs = snapshot(out / "runs")
    other = grid(seeds=0, variants=[{"name": "both"}], evaluate=[{"kind": "knn", "set": {"k": 7}}])
    assert compare(other, "two", tmp_path / "set", data=data, out=out, report=Silent(), speed=SPEED).done == 1
    assert snapshot(out / "runs") == runs
    extract_targets(photos, tmp_path / "set", extract_settings(views=2), report=Silent())
    compare(one, "one", tmp_path / "set", data=data, out=out, report=Silent(), speed=SPEED)
    assert len(list((out / "runs").iterdir())) == 2


def test_names_of_reports():
    assert [report_name(text, False) for text in ("table2", "a/b c.yaml", "..yaml", "../x.yml")] == [
        "table2", "b-c", "grid", "x",
    ]  # fmt: skip
    assert report_name("table2", True) == "table2-small"
