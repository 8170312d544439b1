"""The benchmark of the paper's orders: its runs, and what a result that is there already saves."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paired import packed
from benchmarks.paper_orders import extraction, measure, planned
from benchmarks.paper_tables import paper_orders
from benchmarks.view_arms import Bench
from cae2pipe.config.base import fingerprinted
from cae2pipe.runtime.progress import Silent

SCORED = {"knn": 1.0, "linear": 2.0, "right": {"knn": "8:00", "linear": "8:01"}}
pytestmark = pytest.mark.filterwarnings("ignore:CAE2PIPE_REAL")


def test_runs_that_a_result_has_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAE2PIPE_REAL", raising=False)
    bench = Bench(tmp_path, tmp_path / "images", 32, 0, 0, 1, "cpu", True)
    options = Namespace(seeds=2, views=1, quick=True, device="cpu", out=tmp_path / "result.json")
    plan = planned(options, fingerprinted(extraction(bench)))
    # CAE, masked alone, visible alone, both, random masks; the grids share the second and the fourth.
    assert len(plan) == 2 * 8
    assert len({run.name for run in plan}) == 2 * 5
    assert {run.settings.model.grid for run in plan} == {4}
    rows = [
        {"grid": run.grid, "variant": run.variant, "seed": run.seed, "run": run.name, **SCORED}
        for run in plan
        if run.grid != "table2" or run.variant == "visible alone"
    ]
    options.out.write_text(json.dumps({"rows": [*rows, {**rows[0], "run": "of other settings"}]}))
    found = measure(bench, options, Silent())
    assert len(found) == len(plan)
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "runs").exists()


def test_the_table_says_which_orders_hold(tmp_path: Path) -> None:
    assert paper_orders(tmp_path) == "Nothing has been measured."
    rng = np.random.default_rng(0)
    chances = {"CAE": 0.3, "masked alignment": 0.6, "CAE v2": 0.4}
    rows: list[dict[str, object]] = []
    for seed in range(3):
        for variant, chance in chances.items():
            hits = {"knn": rng.random(804) < chance, "linear": rng.random(804) < 0.5}
            scores = {name: 100 * float(each.mean()) for name, each in hits.items()}
            right = {name: packed(each) for name, each in hits.items()}
            rows.append({"grid": "table1", "variant": variant, "seed": seed, **scores, "right": right})
    content = {"rows": rows}
    (tmp_path / "paper_orders-cpu.json").write_text(json.dumps(content))
    scores, orders = paper_orders(tmp_path).split("\n\n")
    assert [line.split(" | ")[1] for line in scores.splitlines()[2:]] == ["CAE", "masked alignment", "CAE v2"]
    assert [line.split(" | ")[-2:] for line in orders.splitlines()[2:]] == [
        ["holds", "cannot be told |"],
        ["does not hold", "cannot be told |"],
    ]
    assert "| Table 1 | masked alignment over CAE | +" in orders
    assert " | +2.6 | holds | " in orders
