"""A compact picture of which views of which shards exist, for any number of them."""

from __future__ import annotations

import numpy as np

from cae2pipe.reporting.html import Html, element, figure, image
from cae2pipe.reporting.pictures import png_uri
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.coverage import ABSENT, DAMAGED, PRESENT, Coverage

COLUMNS, ROWS = 128, 64
"""Maximum number of cells. More stores than that share cells."""
CELL = 8
"""Side of a cell in pixels of the picture, the last of which is a gap."""
MISSING_COLOUR, PRESENT_COLOUR, DAMAGED_COLOUR = ((176, 172, 165), (0, 114, 178), (213, 94, 0))


def coverage_grid(coverage: Coverage) -> Html:
    """The grid with its caption. The longer axis is horizontal."""
    cells = coverage.cells
    across, down = counted(cells.shape[1], "shard"), counted(cells.shape[0], "view")
    if cells.shape[0] > cells.shape[1]:
        cells, across, down = cells.T, down, across
    picture = grid_picture(cells)
    present = int((cells == PRESENT).sum())
    text = f"{present:,} of {cells.size:,} stores exist: {down} from top to bottom, {across} from left to right. "
    text += "Blue: present; grey: missing" + ("; orange: damaged." if (cells == DAMAGED).any() else ".")
    if picture.shape[1] == COLUMNS * CELL or picture.shape[0] == ROWS * CELL:
        text += " A cell may represent several stores: the paler, the more of them are missing."
    grid = element("div", image(png_uri(picture), text, pixelated=True), style=f"max-width: {2 * picture.shape[1]}px")
    return figure(grid, text)


def grid_picture(cells: np.ndarray) -> np.ndarray:
    """Cells (rows, cols) as RGBA uint8, ``CELL`` pixels each, gaps transparent."""
    rows, columns = (min(most, length) for most, length in zip((ROWS, COLUMNS), cells.shape, strict=True))
    share = pooled(cells == PRESENT, rows, columns)[..., None]
    colours = (1 - share) * np.array(MISSING_COLOUR) + share * np.array(PRESENT_COLOUR)
    # A single damaged or missing store must be visible among thousands.
    colours[pooled(cells == DAMAGED, rows, columns) > 0] = DAMAGED_COLOUR
    some = (pooled(cells == ABSENT, rows, columns) > 0) & (share[..., 0] > 0.8)
    colours[some] = 0.2 * np.array(MISSING_COLOUR) + 0.8 * np.array(PRESENT_COLOUR)
    solid = np.concatenate([np.round(colours), np.full((rows, columns, 1), 255)], axis=-1).astype(np.uint8)
    picture = solid.repeat(CELL, axis=0).repeat(CELL, axis=1)
    picture[CELL - 1 :: CELL] = 0
    picture[:, CELL - 1 :: CELL] = 0
    return picture


def pooled(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means of values (h, w) over an even division into rows x columns; rows <= h, columns <= w."""
    height, width = values.shape
    down, across = (np.arange(count) * length // count for count, length in ((rows, height), (columns, width)))
    sums = np.add.reduceat(np.add.reduceat(values.astype(float), down, axis=0), across, axis=1)
    sizes = np.diff([*down, height])[:, None] * np.diff([*across, width])
    means: np.ndarray = sums / sizes
    return means
