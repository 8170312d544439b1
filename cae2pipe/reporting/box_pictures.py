"""Boxes on photographs: true and detected objects side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cae2pipe.reporting.label_pictures import class_colours
from cae2pipe.reporting.pictures import Picture, captioned, png_bytes, tiled
from cae2pipe.runtime.foreign_names import visible

SIDE = 320
"""Side in pixels of the square that each picture is fitted into."""

Boxes = tuple[np.ndarray, np.ndarray]


def box_picture(image: Picture, boxes: Boxes, names: Sequence[str]) -> Picture:
    """A photograph on a grey square, with boxes (n, 4) outlined and labelled in the colours of their classes; labels
    start at 1."""
    scale = SIDE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    page = Image.new("RGB", (SIDE, SIDE), (235, 235, 235))
    page.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    draw, font, colours = ImageDraw.Draw(page), ImageFont.load_default(size=12), class_colours(len(names))
    for corners, label in zip(boxes[0] * scale, boxes[1], strict=True):
        colour = tuple(int(value) for value in colours[label - 1])
        left, top, right, bottom = (float(value) for value in corners)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        name = visible(names[label - 1])
        draw.rectangle(draw.textbbox((left + 2, top), name, font=font), fill=colour)
        draw.text((left + 2, top), name, fill=(255, 255, 255), font=font)
    return np.asarray(page)


def box_sheet(drawn: Sequence[tuple[Picture, Boxes, Boxes]], names: Sequence[str]) -> bytes | None:
    """A PNG with one row per image, true boxes on the left; None without images."""
    if not drawn:
        return None
    rows = [[box_picture(image, boxes, names) for boxes in (truth, detected)] for image, truth, detected in drawn]
    captions = [((SIDE + 6) * n + SIDE // 2, text) for n, text in enumerate(("truth", "detections"))]
    return png_bytes(captioned(tiled(rows), captions))
