"""Photometric distortion: mmsegmentation's ranges, its order, and no channel in another's place."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
from PIL import Image

from cae2pipe.dense import distortion
from cae2pipe.dense.distortion import distort, scaled_contrast, scaled_saturation, shifted_brightness, shifted_hue

ORANGE = (200, 100, 20)


def flat(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (2, 2), colour)


def colour_of(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image)[0, 0].tolist())


def hsv(colour: tuple[int, ...]) -> tuple[float, float, float]:
    return colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))


def test_each_step_by_hand():
    assert colour_of(shifted_brightness(flat(ORANGE), 31)) == (231, 131, 51)
    assert colour_of(shifted_brightness(flat(ORANGE), -32)) == (168, 68, 0)
    assert colour_of(scaled_contrast(flat(ORANGE), 1.5)) == (255, 150, 30)
    assert colour_of(scaled_contrast(flat(ORANGE), 0.5)) == (100, 50, 10)


@pytest.mark.parametrize("colour", [ORANGE, (20, 30, 200), (40, 160, 90)])
def test_saturation_and_hue_in_hsv(colour):
    """Pillow's HSV has 256 levels, mmsegmentation's 180 of the hue."""
    hue, saturation, value = hsv(colour)
    for factor in (0.5, 0.8, 1.5):
        found = hsv(colour_of(scaled_saturation(flat(colour), factor)))
        assert found == pytest.approx((hue, min(1, saturation * factor), value), abs=0.02)
    for shift in (-18, 5, 17):
        found = hsv(colour_of(shifted_hue(flat(colour), shift)))
        turned = (found[0] - hue + 0.5) % 1 - 0.5
        assert turned * 180 == pytest.approx(shift, abs=2)
        assert found[1:] == pytest.approx((saturation, value), abs=0.02)


def test_ranges_and_order_of_many_draws(monkeypatch):
    """Every step in half of the draws; contrast before saturation and hue, or after, in half of those that have it."""
    drawn: list[list[tuple[str, float]]] = []
    for name in ("shifted_brightness", "scaled_contrast", "scaled_saturation", "shifted_hue"):
        monkeypatch.setattr(
            distortion, name, lambda image, amount, name=name: drawn[-1].append((name, amount)) or image
        )
    random.seed(0)
    for _ in range(4000):
        drawn.append([])
        distort(flat(ORANGE))
    amounts: dict[str, list[float]] = {}
    for name, amount in (step for steps in drawn for step in steps):
        amounts.setdefault(name, []).append(amount)
    ranges = {
        "shifted_brightness": (-32, 32),
        "scaled_contrast": (0.5, 1.5),
        "scaled_saturation": (0.5, 1.5),
        "shifted_hue": (-18, 17),
    }
    assert amounts.keys() == ranges.keys()
    for name, (least, most) in ranges.items():
        found, share = amounts[name], 0.01 * (most - least)
        assert len(found) == pytest.approx(2000, abs=130)
        assert least <= min(found) <= least + share
        assert most - share <= max(found) <= most
    assert set(amounts["shifted_hue"]) == set(range(-18, 18))
    orders = [[name for name, _ in steps] for steps in drawn if len(steps) == 4]
    first = ["shifted_brightness", "scaled_contrast", "scaled_saturation", "shifted_hue"]
    last = ["shifted_brightness", "scaled_saturation", "shifted_hue", "scaled_contrast"]
    assert all(order in (first, last) for order in orders)
    assert orders.count(first) / len(orders) == pytest.approx(0.5, abs=0.12)


def test_no_channel_takes_another_s_place():
    """The hue turns by at most a tenth of the circle; with green and blue swapped it would by 0.14."""
    random.seed(0)
    brown = (120, 80, 50)  # which no step clips
    for _ in range(400):
        turned = (hsv(colour_of(distort(flat(brown))))[0] - hsv(brown)[0] + 0.5) % 1 - 0.5
        assert abs(turned) < 0.12
