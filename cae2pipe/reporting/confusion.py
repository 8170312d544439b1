"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cae2pipe.reporting.pictures import Picture
from cae2pipe.runtime.foreign_names import visible

NAMED = 40
"""Maximum number of classes for which rows and columns have names and cells contain shares."""
CELL, SIDE = 44, 880
"""Pixels of a cell with names, and of the whole square without names."""
DARK = np.array([0, 78, 130])
INK, GREY = (40, 40, 40), (110, 110, 110)
LONGEST = 18


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Picture:
    """A square whose rows are true classes and whose columns are predicted ones.

    Args:
        counts: int (C, C), images by true class (row) and predicted class (column). names: of the C classes.

    Colours show the square root of the share within a row, so that rare confusions are visible.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    named = len(names) <= NAMED
    side = CELL * len(names) if named else SIDE
    depth = np.sqrt(shares)[..., None]
    cells = np.round(255 + (DARK - 255) * depth).astype(np.uint8)
    square = Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST if named else Image.Resampling.BOX)
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    shown = [visible(name) for name in names] if named else []
    labels = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in shown]
    margin = 46 + max((round(font.getlength(label)) for label in labels), default=0)
    page = Image.new("RGB", (margin + side + 20, margin + side + 20), (255, 255, 255))
    page.paste(square, (margin, margin))
    draw = ImageDraw.Draw(page)
    draw.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline=GREY)
    draw.text((margin + side // 2, 16), f"predicted class ({len(names)})", fill=INK, font=font, anchor="mm")
    turned(page, "true class", (16, margin + side // 2), font=font)
    for number, label in enumerate(labels):
        middle = margin + CELL * number + CELL // 2
        draw.text((margin - 8, middle), label, fill=GREY, font=font, anchor="rm")
        turned(page, label, (middle, margin - 8 - round(font.getlength(label)) // 2), font=font, fill=GREY)
        for column, share in enumerate(shares[number]):
            if counts[number, column]:
                centre = margin + CELL * column + CELL // 2, middle
                colour = (255, 255, 255) if share > 0.35 else INK
                draw.text(centre, f"{100 * share:.0f}", fill=colour, font=small, anchor="mm")
    return np.asarray(page)


def turned(
    page: Image.Image,
    text: str,
    middle: tuple[int, int],
    *,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    fill: tuple[int, int, int] = INK,
) -> None:
    """Draw text upwards, centred on a point."""
    card = Image.new("RGB", (round(font.getlength(text)) + 4, 22), (255, 255, 255))
    ImageDraw.Draw(card).text((card.width // 2, 11), text, fill=fill, font=font, anchor="mm")
    card = card.rotate(90, expand=True)
    page.paste(card, (middle[0] - card.width // 2, middle[1] - card.height // 2))
