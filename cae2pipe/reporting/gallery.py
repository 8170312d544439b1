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
    resized_picture,
)
from cae2pipe.training.student import LatentPreview

SIDE = 112
"""Side of a view on the page, in pixels."""


@dataclass(frozen=True)
class MaskRow:
    """Views (S, S, 3) with masks, bool (rows, cols), of one masking strategy."""

    name: str
    views: Sequence[Picture]
    masks: Sequence[np.ndarray]


@dataclass(frozen=True)
class NeighbourRow:
    """For the features of ``name``: indices of the nearest views of each query, nearest first."""

    name: str
    nearest: Sequence[Sequence[int]]


@dataclass
class Gallery:
    """Content of the gallery. ``previews``: by teacher and student, all on the same views. ``neighbours`` and
    ``queries`` are indices into ``views``."""

    masks: list[MaskRow] = field(default_factory=list)
    previews: dict[str, dict[str, list[LatentPreview]]] = field(default_factory=dict)
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
    """The sections of the gallery; empty ones are omitted."""
    parts: list[Html] = []
    if gallery.masks:
        parts += [
            element("h2", "Masks"),
            element("p", "Stored views as students see them in the first epoch. Grey patches are masked."),
            mask_table(gallery.masks),
        ]
    if gallery.previews:
        parts += [
            element("h2", "Latents of teacher and students"),
            element(
                "p",
                "Colours are the first three principal components of the teacher's latents, the same in all pictures "
                "next to them: similar colours mean similar latents. Students see only the visible patches (with the "
                "masks above). They predict the latents of all patches, or only of visible ones (black: no "
                "prediction). Below each picture: the centred cosine with the teacher on masked patches.",
            ),
            *(latent_table(whose, previews) for whose, previews in gallery.previews.items()),
        ]
    if gallery.neighbours:
        parts += [
            element("h2", "Nearest neighbours"),
            element(
                "p",
                f"Of {len(gallery.views)} stored views, those whose mean patch token is nearest to the first view's.",
            ),
            *(
                part
                for number in range(len(gallery.queries))
                for part in (element("h3", f"View {number + 1}"), neighbour_table(gallery, number))
            ),
        ]
    if gallery.left_out:
        parts.append(element("p", "No pictures of: " + "; ".join(gallery.left_out), class_="small"))
    return parts


def mask_table(rows: Sequence[MaskRow]) -> Html:
    cells: list[list[Child]] = []
    for row in rows:
        shown = [
            photograph(hide_patches(resized_picture(view, SIDE, SIDE), mask), f"A view with {row.name}")
            for view, mask in zip(row.views, row.masks, strict=True)
        ]
        cells.append([row.name, *shown])
    return grid([], cells)


def latent_table(teacher: str, by_student: dict[str, list[LatentPreview]]) -> Html:
    """One row per view: the view, the latents of ``teacher``, and the prediction of every student."""
    some = next(iter(by_student.values()))
    basis = colour_basis(np.concatenate([preview.teacher for preview in some]))
    cells: list[list[Child]] = []
    for index, one in enumerate(some):
        line: list[Child] = [
            photograph(resized_picture(one.view, SIDE, SIDE), "A stored view"),
            latents(one.teacher, one.mask.shape, basis, whose=f"the {teacher}"),
        ]
        for name, previews in by_student.items():
            own = previews[index]
            shown = latents(own.student, own.mask.shape, basis, whose=name)
            line.append(
                element("div", shown, element("figcaption", BLANK if math.isnan(own.cosine) else f"{own.cosine:.2f}"))
            )
        cells.append(line)
    return grid(["view", teacher, *by_student], cells)


def neighbour_table(gallery: Gallery, number: int) -> Html:
    """The neighbours of query ``number``, one row for the features of each encoder."""
    query = photograph(resized_picture(gallery.views[gallery.queries[number]], SIDE, SIDE), "The query")
    cells: list[list[Child]] = []
    for row in gallery.neighbours:
        alt = f"A neighbour by {row.name}"
        near = [photograph(resized_picture(gallery.views[index], SIDE, SIDE), alt) for index in row.nearest[number]]
        cells.append([row.name, query, *near])
    return grid([], cells)


def photograph(picture: Picture, alt: str) -> Html:
    return image(jpeg_uri(picture, quality=80), alt)


def latents(tokens: np.ndarray, shape: tuple[int, ...], basis: ColourBasis, *, whose: str) -> Html:
    """Latents (P, D) as colours; tokens of norm 0 are black."""
    rows, cols = shape
    colours = latent_colours(tokens, rows, cols, basis=basis)
    colours[~tokens.any(axis=1).reshape(shape)] = 0
    return image(png_uri(colours), f"Latents of {whose} as colours", pixelated=True)


def grid(headers: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    """Pictures in rows and columns at fixed size; a wide grid scrolls."""
    head = [element("tr", *(element("th", text, scope="col") for text in headers))] if headers else []
    body = [
        element("tr", *(element("td", cell, class_=None if isinstance(cell, Html) else "name") for cell in row))
        for row in rows
    ]
    return element("div", element("table", *head, *body, class_="pictures"), class_="wide")
