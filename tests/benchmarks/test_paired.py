"""Differences on the same images and seeds, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.paired import difference, packed, unpacked, verdict


@given(arrays(bool, st.integers(0, 40)))
def test_packed_hits_are_read_back(right):
    assert (unpacked(packed(right)) == right).all()


@pytest.mark.parametrize(("seeds", "by_seed"), [(2, 0.0), (3, 0.0), (3, 0.05), (3, 0.15), (6, 0.05)])
def test_the_interval_contains_the_true_difference_about_as_often_as_it_says(seeds, by_seed):
    """Variants with chances that depend on image, run and variant; other images and other runs are drawn each time."""
    rng, missed, off = np.random.default_rng(0), 0, []
    for _ in range(400):
        hard, lucky = rng.normal(0, 0.2, (2, 1, 200)), rng.normal(0, by_seed, (2, seeds, 1))
        chance = np.array([0.5, 0.54]).reshape(2, 1, 1) + hard + lucky
        points, margin = difference(*(rng.random((2, seeds, 200)) < chance))
        missed += abs(points - 4.0) > margin
        off.append(points - 4.0)
    assert abs(np.mean(off)) < 1.5
    assert missed <= 0.09 * 400


def test_equal_hits_do_not_differ_and_one_seed_says_nothing():
    right = np.random.default_rng(1).random((3, 50)) < 0.5
    assert difference(right, right) == (0.0, 0.0)
    assert verdict(0.0, 0.0, 2.6) == "cannot be told"
    points, margin = difference(np.zeros((1, 4), bool), np.ones((1, 4), bool))
    assert points == 100.0
    assert math.isnan(margin)
    assert verdict(points, margin, 2.6) == "cannot be told"


@pytest.mark.parametrize(
    ("points", "paper", "said"),
    [(4.1, 2.6, "holds"), (-4.1, 2.6, "does not hold"), (4.0, 2.6, "cannot be told"), (-3.9, 0.1, "cannot be told")],
)
def test_the_interval_decides(points, paper, said):
    assert verdict(points, 4.0, paper) == said
