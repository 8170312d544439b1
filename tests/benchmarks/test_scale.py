"""The benchmark of large data sets, on small ones."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import scale

pytestmark = pytest.mark.filterwarnings("ignore:CAE2PIPE_REAL")


def test_every_part_is_measured_and_the_rest_extrapolated(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["scale", "--quick", "--out", str(out)])
    real_set = scale.real_set
    monkeypatch.setattr(scale, "real_set", lambda scratch: real_set(scratch, images=70))
    monkeypatch.setattr(scale, "run_part", run_here)
    monkeypatch.setattr(scale, "SETS", [("small", 2, 2), ("large", 4, 2)])
    monkeypatch.setattr(scale, "BILLION", ("larger", 8, 70, 2))
    monkeypatch.setattr(scale, "ENTRIES", 2)
    monkeypatch.setattr(scale, "LISTED", (10, 20))
    scale.main()
    result = json.loads(out.read_text())
    rows = {(row["size"], row["what"]): row for row in result["rows"]}
    writing = [rows[size, "writing the manifest"] for size in ("small", "large", "larger")]
    assert [row["units"] for row in writing] == [1 + 2 * 3, 1 + 4 * 3, 1 + 8 * 3]
    assert [row.get("extrapolated", False) for row in writing] == [False, False, True]
    assert 0 < writing[0]["file_mb"] < writing[1]["file_mb"]
    assert ("larger", "worker: its streams' first samples") in rows
    assert [check["goal"] for check in result["checks"]] == ["<= 3", "<= 500", "<= 50"]


def run_here(part, **arguments):
    """A part in this process: importing torch in one of its own takes seconds."""
    from benchmarks.scale_parts import PARTS, measured

    return measured(lambda: PARTS[part](**arguments))
