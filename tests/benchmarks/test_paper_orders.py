"""The benchmark of the paper's orders: its runs, and what a result that is there already saves."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.paper_orders import extraction, measure, planned
from benchmarks.view_arms import Bench
from cae2pipe.config.base import fingerprinted
from cae2pipe.runtime.progress import Silent

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
        {"grid": run.grid, "variant": run.variant, "seed": run.seed, "run": run.name, "knn": 1.0, "linear": 2.0}
        for run in plan
        if run.grid != "table2" or run.variant == "visible alone"
    ]
    options.out.write_text(json.dumps({"rows": [*rows, {**rows[0], "run": "of other settings"}]}))
    found = measure(bench, options, Silent())
    assert len(found) == len(plan)
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "runs").exists()
