"""Stored images on a page: crop boxes on the image, and each view above its latents as colours."""

from __future__ import annotations

import numpy as np

from cae2pipe.reporting.html import Child, Html, element, figure, image, join_html
from cae2pipe.reporting.pictures import (
    PALETTE,
    ColourBasis,
    Picture,
    jpeg_uri,
    latent_colours,
    outline_boxes,
    png_uri,
    resized_picture,
)
from cae2pipe.targets.stored_image import StoredImage

SHOWN = 200
"""Side in pixels of a view on the page; views have 224 pixels and are displayed at about this size."""
MOST = 4
"""Maximum number of views shown per image: one per colour of the palette."""
EMPTY = (150, 150, 150)


def stored_card(
    stored: StoredImage, grid: tuple[int, int], basis: ColourBasis, *, heading: Child, caption: str
) -> Html:
    """An image with its crop boxes, then up to ``MOST`` views, each above its latents.

    Args:
        grid: rows and columns of the latents. caption: of the image.
    """
    views = stored.views[:MOST]
    columns = [figure(image(jpeg_uri(boxed(stored), quality=90), f"{stored.key} with its crop boxes"), caption)]
    for number, view in enumerate(views):
        colour = "#{:02x}{:02x}{:02x}".format(*PALETTE[number % len(PALETTE)])
        mark = element("span", "■ ", style=f"color: {colour}")
        name = f"view {view.number}"
        columns.append(
            element(
                "div",
                figure(
                    image(jpeg_uri(resized_picture(view.pixels, SHOWN, SHOWN)), f"{stored.key}, {name}"),
                    join_html((mark, name, ", flipped" if view.flipped else None)),
                ),
                figure(latents_image(view.latents, grid, basis, whose=f"the teacher, {name}")),
            )
        )
    return element("div", element("h3", heading), element("div", *columns, class_="strip five"), class_="card")


def boxed(stored: StoredImage) -> Picture:
    """The image with the crop boxes of the views shown, its longer side twice a view's; grey if it is not kept."""
    scale = 2 * SHOWN / max(stored.height, stored.width)
    height, width = (max(1, round(edge * scale)) for edge in (stored.height, stored.width))
    empty = np.full((height, width, 3), EMPTY, dtype=np.uint8)
    picture = empty if stored.picture is None else resized_picture(stored.picture, height, width)
    boxes = [tuple(edge * scale for edge in view.box) for view in stored.views[:MOST]]
    return outline_boxes(picture, [(left, top, right, bottom) for left, top, right, bottom in boxes])


def latents_image(latents: np.ndarray, grid: tuple[int, int], basis: ColourBasis, *, whose: str) -> Html:
    """Latents (P, D) as colours, one pixel per patch."""
    return image(png_uri(latent_colours(latents, *grid, basis=basis)), f"Latents of {whose} as colours", pixelated=True)
