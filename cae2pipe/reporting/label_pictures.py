"""Label maps as colours: images, true and predicted labels side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from cae2pipe.reporting.pictures import Picture, captioned, enlarge, resized_picture, tiled

WIDTH = 320
"""Width in pixels of each picture on a sheet."""
VOID = (0, 0, 0)
"""The colour of ignored pixels."""


def class_colours(classes: int) -> np.ndarray:
    """Colours uint8 (classes, 3), distinct for neighbouring classes: hues by the golden ratio, in three shades."""
    rows = [
        colorsys.hsv_to_rgb(number * 0.61803398875 % 1, 0.75 - 0.2 * (number % 2), (0.95, 0.7, 0.5)[number % 3])
        for number in range(classes)
    ]
    return np.round(255 * np.array(rows)).astype(np.uint8)


def label_picture(labels: np.ndarray, colours: np.ndarray) -> Picture:
    """Labels (H, W) in the colours of their classes; other values have the colour of ignored pixels."""
    table = np.vstack([colours, np.array([VOID], dtype=np.uint8)])
    picture: Picture = table[np.minimum(labels, len(colours))]
    return picture


def label_sheet(samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: int) -> Picture | None:
    """Rows of image, true and predicted labels, from samples (pixels, labels, labels); None without samples."""
    if not samples:
        return None
    colours = class_colours(classes)
    height = round(WIDTH * samples[0][0].shape[0] / samples[0][0].shape[1])
    rows = [
        [
            resized_picture(image, height, WIDTH),
            *(enlarge(label_picture(labels, colours), height, WIDTH) for labels in (truth, predicted)),
        ]
        for image, truth, predicted in samples
    ]
    step = WIDTH + 6
    captions = [(step * n + WIDTH // 2, text) for n, text in enumerate(("image", "truth", "prediction"))]
    return captioned(tiled(rows), captions)
