"""Settings that were added: folders from before keep their fingerprint."""

from __future__ import annotations

from cae2pipe.config.base import build_recorded, fingerprinted, load
from cae2pipe.config.dense import DetectSettings


def test_a_lowest_rate_came_later():
    now = load(DetectSettings, "evaluate", "detect")
    assert (fingerprinted(now)["min_lr"], now.drop_path) == (1e-6, 0.2)
    stored = fingerprinted(load(DetectSettings, "evaluate", "detect", overrides=["min_lr=0"]))
    assert "min_lr" not in stored
    assert build_recorded(DetectSettings, stored, "here").min_lr == 0
