"""Pictures of a comparison: masks, latents of teacher and students, neighbours. Pure functions to HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cae2pipe.reporting.comparison_text import BLANK
from cae2pipe.reporting.html import Child, Html, element, image
from cae2pipe.reporting.pictures import (
    ColourBasis,
    Picture,
    colour_basis,
    hide_patches,
    jpeg_uri,
    latent_colours,
    png_uri,
    resized,
)
from cae2pipe.training.student import Forecast

SIDE = 112
"""Side of a view on the page, in pixels."""


@dataclass(frozen=True)
class MaskRow:
    """Views (S, S, 3) under the masks, bool (rows, cols), of one way to draw them."""

    name: str
    views: Sequence[Picture]
    masks: Sequence[np.ndarray]


@dataclass(frozen=True)
class NeighbourRow:
    """By the features of ``name``: the indices of the views that are nearest to each query, nearest first."""

    name: str
    nearest: Sequence[Sequence[int]]


@dataclass
class Gallery:
    """What there is to show: ``forecasts`` are a student's on the same views each, by the student's name;
    ``neighbours`` index ``views``, as ``queries`` do."""

    masks: list[MaskRow] = field(default_factory=list)
    forecasts: dict[str, list[Forecast]] = field(default_factory=dict)
    views: list[Picture] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    neighbours: list[NeighbourRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def nearest_views(features: Tensor, queries: Sequence[int], count: int) -> list[list[int]]:
    """For each query the indices of the ``count`` other rows of features (N, D), of unit length, with the highest
    cosine."""
    cosines = features[list(queries)] @ features.T
    cosines[torch.arange(len(queries)), list(queries)] = -torch.inf
    return cosines.topk(min(count, len(features) - 1), dim=1).indices.tolist()


def gallery_html(gallery: Gallery) -> list[Html]:
    """The gallery's sections; those that have nothing to show are left out."""
    parts: list[Html] = []
    if gallery.masks:
        parts += [
            element("h2", "Masks"),
            element("p", "Stored views as the students see them in their first epoch: grey patches are hidden."),
            mask_table(gallery.masks),
        ]
    if gallery.forecasts:
        parts += [
            element("h2", "Latents of teacher and students"),
            element(
                "p",
                "Colours are the first three principal components of the teacher's latents, the same in all pictures: "
                "equal colours, like latents. Students see the visible patches alone (under the masks above), and "
                "predict the latents of all patches, or of visible ones alone (black: none). Below, the centred cosine "
                "with the teacher on masked patches.",
            ),
            latent_table(gallery.forecasts),
        ]
    if gallery.neighbours:
        parts += [
            element("h2", "Nearest neighbours"),
            element(
                "p",
                f"Of {len(gallery.views)} stored views, those whose mean patch is nearest to the first one's.",
            ),
            *(
                part
                for index in range(len(gallery.queries))
                for part in (element("h3", f"View {index + 1}"), neighbour_table(gallery, index))
            ),
        ]
    if gallery.left_out:
        parts.append(element("p", "No pictures of: " + "; ".join(gallery.left_out), class_="small"))
    return parts


def mask_table(rows: Sequence[MaskRow]) -> Html:
    cells: list[list[Child]] = []
    for row in rows:
        shown = [
            photograph(hide_patches(resized(view, SIDE, SIDE), mask), f"A view under {row.name}")
            for view, mask in zip(row.views, row.masks, strict=True)
        ]
        cells.append([row.name, *shown])
    return grid([], cells)


def latent_table(forecasts: dict[str, list[Forecast]]) -> Html:
    """A line a view: the view, the teacher's latents, then for every student what it predicts."""
    some = next(iter(forecasts.values()))
    basis = colour_basis(np.concatenate([forecast.teacher for forecast in some]))
    cells: list[list[Child]] = []
    for index, one in enumerate(some):
        line: list[Child] = [
            photograph(resized(one.view, SIDE, SIDE), "A stored view"),
            latents(one.teacher, one.mask.shape, basis, "the teacher"),
        ]
        for name, of_student in forecasts.items():
            own = of_student[index]
            shown = latents(own.student, own.mask.shape, basis, name)
            line.append(
                element("div", shown, element("figcaption", BLANK if math.isnan(own.cosine) else f"{own.cosine:.2f}"))
            )
        cells.append(line)
    return grid(["view", "teacher", *forecasts], cells)


def neighbour_table(gallery: Gallery, query: int) -> Html:
    """The neighbours of the query of this number, a line for each features."""
    shown = photograph(resized(gallery.views[gallery.queries[query]], SIDE, SIDE), "The query")
    cells: list[list[Child]] = []
    for row in gallery.neighbours:
        alt = f"A neighbour by {row.name}"
        near = [photograph(resized(gallery.views[index], SIDE, SIDE), alt) for index in row.nearest[query]]
        cells.append([row.name, shown, *near])
    return grid([], cells)


def photograph(picture: Picture, alt: str) -> Html:
    return image(jpeg_uri(picture, quality=80), alt)


def latents(tokens: np.ndarray, shape: tuple[int, ...], basis: ColourBasis, whose: str) -> Html:
    """Latents (P, D) as colours; tokens of length 0 are black."""
    rows, cols = shape
    colours = latent_colours(tokens, rows, cols, basis)
    colours[~tokens.any(axis=1).reshape(shape)] = 0
    return image(png_uri(colours), f"Latents of {whose} as colours", pixelated=True)


def grid(headers: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    """Pictures in rows and columns that keep their size; wide ones scroll."""
    head = [element("tr", *(element("th", text, scope="col") for text in headers))] if headers else []
    body = [
        element("tr", *(element("td", cell, class_=None if isinstance(cell, Html) else "name") for cell in row))
        for row in rows
    ]
    return element("div", element("table", *head, *body, class_="pictures"), class_="wide")
