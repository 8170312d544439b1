"""Grids on the target sets of several teachers: the sets that rows train from, their views, and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.cli import app
from cae2pipe.config.base import build, load
from cae2pipe.config.compare import GridSettings, for_sets
from cae2pipe.errors import BadInputError, MismatchError, SettingsError, command
from cae2pipe.evaluation.grid_plan import plan_grid
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.compare import compare
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import edit_manifest, snapshot
from tests.stages.test_compare import GRID, SPEED

ROWS = ["wide alone", "tiny alone", "all together", "all, wide x 2", "all, tiny x 2"]
SMALL = {name: GRID[name] for name in ("config", "set", "evaluate")} | {"seeds": [0]}


@pytest.fixture(scope="module")
def roots(wide_root, summary_root, tmp_path_factory) -> list[Path]:
    """Sets of two teachers; the second one has only the first view of every image."""
    other = Path(shutil.copytree(summary_root, tmp_path_factory.mktemp("one view") / "set"))
    units = json.loads((other / "manifest.json").read_text())["units"]
    edit_manifest(other, units={name: unit for name, unit in units.items() if not name.startswith("v01")})
    return [wide_root, other]


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part in ("train", "val"):
        (folder / part).symlink_to(photos)
    return folder


@pytest.fixture(scope="module")
def shipped() -> GridSettings:
    """The grid ``teachers`` with students that train in a second."""
    return load(GridSettings, "compare", "teachers", values=SMALL)


@pytest.fixture(scope="module")
def finished(shipped, roots, data, tmp_path_factory):
    """The result of that grid, made in two parts, and its folder. Read-only."""
    out = tmp_path_factory.mktemp("teachers") / "out"
    for share in (1, 2):
        part = WorkShare(share, 2)
        found = compare(shipped, "teachers", roots, data=data, out=out, report=Silent(), part=part, speed=SPEED)
    return found, out


def grid(**over) -> GridSettings:
    return build(GridSettings, {**GRID, **over}, "test")


def variants_of(found: GridSettings) -> list[tuple[str, tuple[int, ...], tuple[float, ...] | None]]:
    return [(variant.name, variant.sets, variant.weights) for variant in found.variants]


def test_rows_for_two_and_for_three_sets(shipped):
    assert variants_of(for_sets(shipped, ["a", "b"])) == [
        ("a alone", (1,), None),
        ("b alone", (2,), None),
        ("all together", (1, 2), None),
        ("all, a x 2", (1, 2), (2.0, 1.0)),
        ("all, b x 2", (1, 2), (1.0, 2.0)),
    ]
    three = variants_of(for_sets(shipped, ["a", "b", "c"]))
    assert [sets for _, sets, _ in three] == [(1,), (2,), (3,), *[(1, 2, 3)] * 4]
    assert three[-1] == ("all, c x 2", (1, 2, 3), (1.0, 1.0, 2.0))
    chosen = grid(variants=[{"name": "x", "sets": [3, 1], "weights": [0.5, 1]}, {"name": "y {each}"}])
    assert variants_of(for_sets(chosen, ["a", "b", "c"])) == [("x", (3, 1), (0.5, 1.0)), ("y {each}", (1, 2, 3), None)]
    assert for_sets(grid(), ["a"]).variants[0].sets == (1,)


def test_all_rows_train_on_the_views_that_all_sets_have(finished, roots):
    found, _ = finished
    assert [row.name for row in found.rows] == ROWS
    assert (found.done, found.wanted) == (5, 5)
    common = set(TargetSet(roots[1]).stores)
    assert common < set(TargetSet(roots[0]).stores)
    for row in found.rows:
        (run,) = row.runs
        facts = RunArtifact.open(run).facts
        assert all(set(known["stores"]) == common for known in facts.get("teachers", [facts]))


def test_rows_are_what_pretrain_and_evaluate_give(finished, roots, shipped, data, tmp_path):
    found, out = finished
    plan = plan_grid(shipped, roots, data, out=out, speed=SPEED)
    of = {plan.grid.variants[run.variant].name: run for run in plan.runs}

    def by_hand(row: str, sets: list[Path], **over) -> None:
        settings = of[row].settings.model_dump(mode="json")
        settings["loss"]["teachers"] = over.pop("teachers", None)
        settings["data"] |= over
        pretrain(sets, tmp_path / row, build(type(of[row].settings), settings, "test"), report=Silent())
        made = out / "runs" / of[row].name
        assert (made / "encoder.safetensors").read_bytes() == (tmp_path / row / "encoder.safetensors").read_bytes()

    by_hand("all, tiny x 2", roots, teachers={"tiny": 2.0})
    by_hand("wide alone", roots[:1], views=1)
    run = str(tmp_path / "all, tiny x 2")
    result = evaluate("knn", run, data, out=tmp_path / "scores", settings=plan.evaluations["knn"], report=Silent())
    assert found.rows[4].scores["knn"] == [result["top1"]]


def test_the_report_names_teachers_bytes_and_licences(finished, roots):
    found, out = finished
    sizes = [TargetSet(root).bytes_per_view()["latents"] for root in roots]
    assert [row.latents for row in found.rows] == [*sizes, *[pytest.approx(sum(sizes))] * 3]
    text = (out / "reports" / "teachers" / "report.md").read_text()
    assert "| variant | teachers | knn |" in text
    assert "| all together | wide, tiny | " in text
    assert "| all, tiny x 2 | wide, tiny x 2 | " in text
    for label, size in zip(("wide", "tiny"), sizes, strict=True):
        assert f"| {label} | {size / 1000:.1f} | unknown |" in text
    page = (out / "reports" / "teachers" / "report.html").read_text()
    assert [page.count(f"Latents of the teacher {label} as colours") for label in ("wide", "tiny")] == [4, 4]
    # Four views, predicted for each teacher of the row.
    assert [page.count(f"Latents of {name} as colours") for name in ROWS] == [4, 4, 8, 8, 8]
    assert "No pictures of" not in page


def test_the_same_command_makes_nothing_again(finished, roots, data, tmp_path):
    import yaml

    _, out = finished
    before = snapshot(out / "runs") | snapshot(out / "scores")
    path = tmp_path / "teachers.yaml"
    path.write_text(yaml.safe_dump({"extends": "teachers", **SMALL}))
    arguments = ["compare", str(path), *map(str, roots), str(data), str(out), "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "all, wide x 2" in done.stdout
    assert snapshot(out / "runs") | snapshot(out / "scores") == before


def test_a_row_of_one_set_shares_its_run_with_grids_on_that_set(wide_root, summary_root, data, shipped, tmp_path):
    both = plan_grid(shipped, [wide_root, summary_root], data, out=tmp_path / "out")
    alone = plan_grid(grid(variants=[{"name": "x"}], seeds=0), wide_root, data, out=tmp_path / "out")
    assert both.runs[0].name == alone.runs[0].name
    equal = [{"name": "x"}, {"name": "y", "weights": [1, 1]}, {"name": "z", "sets": [2, 1]}]
    weighted = grid(variants=equal, seeds=0)
    names = [run.name for run in plan_grid(weighted, [wide_root, summary_root], data, out=tmp_path / "out").runs]
    assert names[0] == names[1] == both.runs[2].name != names[2]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"sets": []}, "sets must be non-empty and unique"),
        ({"sets": [1, 1]}, "sets must be non-empty and unique"),
        ({"sets": [0]}, "sets.*greater than or equal to 1"),
        ({"sets": "each"}, "its name must contain {each}"),
        ({"name": "{each}", "sets": "each", "weights": [1, 2]}, "weights and sets: each exclude each other"),
        ({"weights": [1, 2], "set": {"loss": {"teachers": {"a": 2}}}}, "weights and set.loss.teachers exclude"),
        ({"weights": [1, 0]}, "weights.*greater than 0"),
    ],
)
def test_variants_that_cannot_be_meant(variant, message):
    with pytest.raises(SettingsError, match=message):
        grid(variants=[{"name": "odd", **variant}])


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"sets": [3]}, r"(?s)trains from target set 3, and there are 2.*variant 'odd'"),
        ({"weights": [1, 2, 3]}, "3 weights for 2 target sets"),
        ({"weights": []}, "0 weights for 2 target sets"),
        ({"sets": [2], "weights": [2]}, "compares teachers, and it has one"),
        ({"set": {"loss": {"target": "pixels", "kind": "mse", "visible": 0.0}, "method": "mae"}}, "pixel targets"),
        ({"set": {"loss": {"teachers": {"dino": 2.0}}}}, "no teacher of these target sets"),
        ({"codec": {"name": "klt"}}, "error would be added"),
    ],
)
def test_variants_that_do_not_fit_the_sets(variant, message, roots, data, tmp_path):
    with pytest.raises(BadInputError, match=message) as caught:
        plan_grid(grid(variants=[{"name": "odd", **variant}]), roots, data, out=tmp_path / "out")
    assert caught.value.fix


def test_sets_that_do_not_fit_the_grid_or_each_other(shipped, roots, stored_root, data, tmp_path):
    with pytest.raises(SettingsError, match="compares teachers, and it has one target set") as caught:
        plan_grid(shipped, roots[:1], data, out=tmp_path / "out")
    assert "TARGETS TARGETS DATA OUT" in caught.value.fix
    with pytest.raises(MismatchError, match="no views in common"):
        plan_grid(shipped, [roots[0], stored_root], data, out=tmp_path / "out")
    with pytest.raises(SettingsError, match="a teacher twice"):
        plan_grid(shipped, [roots[0], roots[0]], data, out=tmp_path / "out")
    # A forgotten OUT or DATA moves a set to the place of DATA.
    done = CliRunner().invoke(app, ["compare", "teachers", *map(str, roots), str(data)])
    assert done.exit_code == 2
    assert "come after all target sets" in done.output.replace("\n", " ")
    with pytest.raises(SettingsError, match="come after all target sets") as caught:
        plan_grid(shipped, roots[:1], data, out=roots[1])
    assert caught.value.fix == command("compare", "GRID", *roots, "DATA", "OUT")
