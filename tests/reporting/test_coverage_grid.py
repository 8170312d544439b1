"""The picture of which stores exist: a cell per store, or shared by several if there are many."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.reporting.coverage_grid import (
    CELL,
    COLUMNS,
    DAMAGED_COLOUR,
    MISSING_COLOUR,
    PRESENT_COLOUR,
    ROWS,
    coverage_grid,
    grid_picture,
    pooled,
)
from cae2pipe.targets.coverage import ABSENT, DAMAGED, PRESENT, Coverage


def test_each_store_has_a_cell():
    picture = grid_picture(np.array([[PRESENT, ABSENT], [DAMAGED, PRESENT]], dtype=np.uint8))
    assert picture.shape == (2 * CELL, 2 * CELL, 4)
    centres = picture[CELL // 2 :: CELL, CELL // 2 :: CELL]
    assert centres[..., :3].tolist() == [[[*PRESENT_COLOUR], [*MISSING_COLOUR]], [[*DAMAGED_COLOUR], [*PRESENT_COLOUR]]]
    assert (centres[..., 3] == 255).all()
    assert (picture[CELL - 1, :, 3] == 0).all()


def test_one_store_of_very_many_is_seen():
    cells = np.full((100, 13_000), PRESENT, dtype=np.uint8)
    whole = grid_picture(cells)
    assert whole.shape == (ROWS * CELL, COLUMNS * CELL, 4)
    for state in (ABSENT, DAMAGED):
        cells[57, 8_000] = state
        assert (grid_picture(cells) != whole).any()


def test_the_longer_axis_is_horizontal():
    text = coverage_grid(Coverage(["000000"], np.full((32, 1), PRESENT, dtype=np.uint8)))
    assert "32 of 32 stores exist: 1 shard from top to bottom, 32 views from left to right" in text


@given(st.data())
def test_pooling_keeps_the_mean_where_it_divides_evenly(data):
    rows, columns, down, across = (data.draw(st.integers(1, 5)) for _ in range(4))
    bits = st.lists(st.booleans(), min_size=rows * down * columns * across, max_size=rows * down * columns * across)
    values = np.array(data.draw(bits)).reshape(rows * down, columns * across)
    means = pooled(values, rows, columns)
    assert means.shape == (rows, columns)
    np.testing.assert_allclose(means.mean(), values.mean())
    np.testing.assert_allclose(means[0, 0], values[:down, :across].mean())
