"""Latents, masks and views as pictures: pure functions of numpy arrays.

Pictures are uint8 (H, W, 3). The colours of latents are their first three principal components. All pictures of a page
share one basis, so similar colours mean similar latents everywhere on it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture = np.ndarray
Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))
"""Okabe and Ito's colours, which are distinct for colour-blind people too: one per view."""


@dataclass(frozen=True)
class ColourBasis:
    """Mapping from latents to colours: ``mean`` (D,), ``axes`` (D, 3), and the values ``low`` and ``high`` (3,) that
    map to 0 and 255."""

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray


def colour_basis(latents: np.ndarray) -> ColourBasis:
    """The first three principal axes of latents (..., D), D >= 3, with the range of the middle 98% on each.

    An axis' sign is arbitrary: its component of largest magnitude is made positive.
    """
    flat = np.asarray(latents, dtype=np.float64).reshape(-1, latents.shape[-1])
    mean = flat.mean(axis=0)
    centred = flat - mean
    # eigh of the (D, D) covariance, not an SVD of all tokens, of which there are thousands.
    axes = np.linalg.eigh(centred.T @ centred)[1][:, :-4:-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    low, high = np.percentile(centred @ axes, (1, 99), axis=0)
    return ColourBasis(mean, axes, low, high)


def latent_colours(latents: np.ndarray, rows: int, cols: int, *, basis: ColourBasis) -> Picture:
    """Latents (rows * cols, D) as a picture with one pixel per patch, (rows, cols, 3)."""
    values = (np.asarray(latents, dtype=np.float64) - basis.mean) @ basis.axes
    span = np.maximum(basis.high - basis.low, 1e-12)
    share = np.clip((values - basis.low) / span, 0, 1)
    picture: Picture = np.round(share * 255).astype(np.uint8).reshape(rows, cols, 3)
    return picture


HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
"""Viridis at five points: lightness increases with the value, so it is readable without colour vision too."""


def heat_map(values: np.ndarray, low: float, high: float) -> Picture:
    """Values (rows, cols) as a picture with one pixel each: ``low`` is dark violet, ``high`` yellow."""
    share = np.clip((np.asarray(values, dtype=float) - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(share, stops, HEAT[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def enlarge(picture: Picture, height: int, width: int) -> Picture:
    """Every pixel enlarged to a block: for patch grids, whose edges should be visible."""
    rows = np.arange(height) * picture.shape[0] // height
    cols = np.arange(width) * picture.shape[1] // width
    enlarged: Picture = picture[rows][:, cols]
    return enlarged


def resized_picture(picture: Picture, height: int, width: int) -> Picture:
    """A photograph at another size."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def hide_patches(view: Picture, mask: np.ndarray, fill: Colour = (128, 128, 128), *, strength: float = 0.88) -> Picture:
    """The view with its masked patches (mask: bool (rows, cols), True is masked) painted over, slightly transparent."""
    hidden = enlarge(mask, view.shape[0], view.shape[1])[..., None]
    painted = view * (1 - strength) + np.array(fill) * strength
    return np.where(hidden, np.round(painted), view).astype(np.uint8)


def outline_boxes(picture: Picture, boxes: Sequence[tuple[float, float, float, float]], width: int = 3) -> Picture:
    """The picture with boxes (left, top, right, bottom), in pixels, outlined in the palette's colours."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for number, (left, top, right, bottom) in enumerate(boxes):
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw.rectangle(corners, outline=PALETTE[number % len(PALETTE)], width=width)
    return np.asarray(image)


def tiled(rows: Sequence[Sequence[Picture]], gap: int = 6, fill: Colour = (255, 255, 255)) -> Picture:
    """Pictures of equal size laid out in rows, ``gap`` pixels apart; short rows are padded."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.empty((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), dtype=np.uint8)
    sheet[:] = fill
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            top, left = number * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def captioned(sheet: Picture, captions: Sequence[tuple[int, str]], height: int = 30, *, margin: int = 12) -> Picture:
    """A sheet on a white card with captions above, each centred about its x (pixels of the sheet)."""
    page = Image.new("RGB", (sheet.shape[1] + 2 * margin, sheet.shape[0] + height + 2 * margin), (255, 255, 255))
    page.paste(Image.fromarray(sheet), (margin, margin + height))
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=15)
    for x, text in captions:
        draw.text((margin + x, margin + height // 2), text, fill=(60, 60, 60), font=font, anchor="mm")
    return np.asarray(page)


def png_bytes(picture: Picture) -> bytes:
    return _encoded(picture, "PNG", optimize=True)


def png_uri(picture: Picture) -> str:
    """A ``data:`` URI, lossless: for patch grids and drawings."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def jpeg_uri(picture: Picture, quality: int = 85) -> str:
    """A ``data:`` URI, lossy: for photographs."""
    return "data:image/jpeg;base64," + base64.b64encode(_encoded(picture, "JPEG", quality=quality)).decode("ascii")


def _encoded(picture: Picture, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()
