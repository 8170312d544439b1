import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.errors import SettingsError
from cae2pipe.models.masks import attention_mask, block_mask, draw_mask, place_blocks, random_mask, split_indices

SAMPLES = 600


@st.composite
def grids(draw):
    rows, cols = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    return rows, cols, draw(st.integers(0, rows * cols))


@settings(deadline=None)
@given(grids(), st.sampled_from(["block", "random", "attention"]), st.integers(0, 2**32), st.text(max_size=5))
def test_a_mask_masks_exactly_what_is_asked_and_hangs_on_its_key_alone(grid, strategy, seed, name):
    rows, cols, count = grid
    mask = draw_mask(strategy, rows, cols, count, "mask", seed, name)
    assert mask.shape == (rows, cols)
    assert mask.dtype == bool
    assert mask.sum() == count
    assert np.array_equal(mask, draw_mask(strategy, rows, cols, count, "mask", seed, name))


@settings(deadline=None)
@given(grids(), st.integers(0, 2**32))
def test_indices_are_sorted_and_share_the_grid(grid, seed):
    rows, cols, count = grid
    mask = random_mask(rows, cols, count, seed)
    visible, masked = split_indices(mask)
    assert visible.dtype == masked.dtype == np.int64
    assert (len(visible), len(masked)) == (rows * cols - count, count)
    assert np.array_equal(np.sort(np.concatenate([visible, masked])), np.arange(rows * cols))
    assert mask.reshape(-1)[masked].all()
    assert (np.diff(visible) > 0).all()
    assert (np.diff(masked) > 0).all()


@pytest.mark.parametrize("strategy", ["block", "random", "attention"])
def test_every_part_of_the_key_matters(strategy):
    keys = [("mask", 0, 0, "a"), ("mask", 1, 0, "a"), ("mask", 0, 1, "a"), ("mask", 0, 0, "b")]
    masks = {draw_mask(strategy, 14, 14, 98, *key).tobytes() for key in keys}
    assert len(masks) == 4


@pytest.mark.parametrize(
    ("count", "blocks", "corner", "centre"),
    [(30, 2.6, 0.02, 0.29), (49, 3.6, 0.02, 0.51), (98, 5.6, 0.07, 0.87), (118, 6.6, 0.09, 0.93)],
)
def test_block_masks_have_the_released_codes_statistics(count, blocks, corner, centre):
    masks = np.mean([block_mask(14, 14, count, "statistics", number) for number in range(SAMPLES)], axis=0)
    placed = np.mean([len(place_blocks(14, 14, count, "statistics", number)) for number in range(SAMPLES)])
    # At least three standard errors of the means of 600 draws, plus the rounding of the published figures.
    assert placed == pytest.approx(blocks, abs=0.2)
    assert masks[[0, 0, -1, -1], [0, -1, 0, -1]].mean() == pytest.approx(corner, abs=0.025)
    assert masks[6:8, 6:8].mean() == pytest.approx(centre, abs=4 * (centre * (1 - centre) / SAMPLES) ** 0.5 + 0.005)


def test_random_masks_have_no_favourite_patches():
    share = np.mean([random_mask(14, 14, 49, "statistics", number) for number in range(SAMPLES)], axis=0)
    assert abs(share - 0.25).max() < 5 * (0.25 * 0.75 / SAMPLES) ** 0.5


def test_what_the_teacher_looks_at_stays_visible_as_drawn_without_replacement():
    """Four patches of attention 8, 4, 2, 1 (0 counts as a quarter), two of them visible."""
    attention = np.array([8, 4, 2, 1, 0], dtype=np.uint8)
    weights = np.array([8, 4, 2, 1, 0.25])
    shares = weights / weights.sum()
    # Drawn first, or second after any other.
    expected = [
        shares[i] + sum(shares[j] * weights[i] / (weights.sum() - weights[j]) for j in range(5) if j != i)
        for i in range(5)
    ]
    draws = 4000
    seen = np.mean([~attention_mask(1, 5, 3, attention, "looks", number)[0] for number in range(draws)], axis=0)
    for got, share in zip(seen, expected, strict=True):
        assert got == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5)


def test_attention_masks_without_attention_have_no_favourites():
    share = np.mean([draw_mask("attention", 14, 14, 49, "even", number) for number in range(SAMPLES)], axis=0)
    assert abs(share - 0.25).max() < 5 * (0.25 * 0.75 / SAMPLES) ** 0.5


def test_single_patches_fill_what_no_block_can():
    # Blocks are smaller than the grid: with one row there are none.
    assert place_blocks(1, 6, 4, "fill") == []
    assert block_mask(1, 6, 4, "fill").sum() == 4


def test_an_unknown_strategy_is_refused():
    with pytest.raises(SettingsError, match="blocks") as caught:
        draw_mask("blocks", 14, 14, 98, 0)
    assert "block" in caught.value.fix


def test_masks_need_no_torch():
    code = "import sys, cae2pipe.models.masks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
