"""Rows and columns, from numbers and from outputs of runs."""

from __future__ import annotations

import pytest

from cae2pipe.comparison.gathering import by_epoch, device_hours, fill_columns, flat, row_names
from cae2pipe.comparison.rows import Finished, Row


def test_device_hours_count_every_device():
    lines = [
        {"images": 3600, "images_per_s": 2.0, "devices": 8},
        {"images": 3600, "images_per_s": 1.0},
        {"images": 5, "images_per_s": 0.0},
    ]
    assert device_hours(lines) == pytest.approx(0.5 * 8 + 1)


def test_means_by_epoch():
    lines = [{"epoch": e, "loss": v} for e, v in ((0, 1.0), (0, 3.0), (1, 5.0))]
    assert by_epoch(lines, "loss") == [2.0, 5.0]


def test_rows_are_named_by_what_sets_them_apart():
    rows = [flat({"a": {"b": v, "c": 1}, "d": w}) for v, w in ((1, "x"), (1, "y"), (2, "x"))]
    assert row_names(rows) == ["", "d=y", "a.b=2"]
    methods = [{"a": 1, "method": "mae"}, {"a": 2, "method": "fd"}, {"a": 2, "method": "fd"}]
    assert row_names(methods)[0] == "method=mae, a=1"
    assert row_names(rows[:1]) == [""]


def finished(score: float, protocol: str = "p", data: str = "d", feature: str = "mean") -> Finished:
    return Finished("linear", score, protocol, data, feature)


def test_other_ways_and_other_data_are_other_columns():
    rows = [
        Row("a", results=[[finished(0.5)], [finished(0.6), finished(0.7, protocol="q")]]),
        Row("b", results=[[finished(0.8, data="e")]]),
    ]
    columns, protocols = fill_columns(rows, ["linear", "knn"])
    assert columns == ["linear (1)", "linear (2)", "linear (3)", "knn"]
    assert [[row.scores[column] for column in columns] for row in rows] == [
        [[0.5, 0.6], [0.7], [], []],
        [[], [], [0.8], []],
    ]
    assert len(set(protocols.values())) == 3
    assert protocols["linear (2)"].startswith("q, data ")
