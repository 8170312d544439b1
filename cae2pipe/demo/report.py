"""The demo's page and picture, put together from what the demo measured and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cae2pipe.demo.measures import MEASURES
from cae2pipe.reporting.html import Child, Html, element, figure, figures, image, join, mark, page, table
from cae2pipe.reporting.pictures import (
    ColourBasis,
    Picture,
    captioned,
    colour_basis,
    enlarge,
    hide_patches,
    jpeg_uri,
    latent_colours,
    resized,
    tiled,
)
from cae2pipe.reporting.plots import Points, bars, curves
from cae2pipe.reporting.stored_images import SHOWN, latents_image, stored_card

if TYPE_CHECKING:
    from cae2pipe.targets.stored_image import StoredImage
    from cae2pipe.training.student import Forecast

PANEL = 132
"""Side of a panel of the picture in pixels."""


@dataclass(frozen=True)
class Step:
    """A command that the demo ran, and one sentence on what it does. ``own`` is the same for a user's own images."""

    text: str
    command: str
    own: str | None = None


@dataclass(frozen=True)
class Contents:
    """All that the page shows.

    ``losses`` are points (epoch, loss); ``bytes_per_view`` has the keys ``fp16``, ``int8``, ``stored``, ``pixels``.
    """

    teacher: str
    codec: str
    grid: tuple[int, int]
    result: Mapping[str, float]
    losses: Sequence[tuple[float, float]]
    bytes_per_view: Mapping[str, float]
    stored: Sequence[StoredImage]
    forecasts: Sequence[Forecast]
    steps: Sequence[Step]


def shared_basis(contents: Contents) -> ColourBasis:
    """One basis for every picture of latents, from the teacher's."""
    latents = [forecast.teacher for forecast in contents.forecasts]
    for one in contents.stored:
        latents += [view.latents for view in one.views]
    return colour_basis(np.concatenate(latents))


def picture(contents: Contents, pairs: int = 2) -> Picture:
    """Test tiles in rows, ``pairs`` a row, each as view, masked view, teacher's latents and student's latents."""
    basis = shared_basis(contents)
    rows, cols = contents.grid
    groups = []
    for forecast in contents.forecasts:
        view = resized(forecast.view, PANEL, PANEL)
        maps = [latent_colours(latents, rows, cols, basis) for latents in (forecast.teacher, forecast.student)]
        groups.append([view, hide_patches(view, forecast.mask), *(enlarge(m, PANEL, PANEL) for m in maps)])
    captions: list[tuple[int, str]] = []
    strips: list[Picture] = []
    left = 0
    for first in range(min(pairs, len(groups))):
        strip = tiled(groups[first::pairs], gap=6)
        if strips:
            strips.append(np.full((strips[0].shape[0], 28, 3), 255, dtype=np.uint8))
            left += 28
        short = (strips[0].shape[0] if strips else strip.shape[0]) - strip.shape[0]
        strips.append(np.pad(strip, ((0, short), (0, 0), (0, 0)), constant_values=255))
        for column, text in enumerate(("view", "visible to it", "teacher", "student")):
            captions.append((left + column * (PANEL + 6) + PANEL // 2, text))
        left += strip.shape[1]
    return captioned(np.concatenate(strips, axis=1), captions)


def render(contents: Contents) -> str:
    """The page, one file that refers to nothing outside itself."""
    basis = shared_basis(contents)
    result = contents.result
    grid = " × ".join(str(side) for side in contents.grid)
    body = [
        element("h1", "A vision transformer pretrained from cached targets"),
        element(
            "p",
            f"The teacher, {contents.teacher}, saw {result['views']:,.0f} views of each of {result['images']:,.0f} "
            "tiles, once. Its latents were compressed and stored beside the pixels; the student was trained from that "
            "store alone.",
            class_="lead",
        ),
        headline(result),
        element("h2", "What the student predicts"),
        element(
            "p",
            "Test tiles, cut from a part of each photograph that training never touched. The student sees the visible "
            "patches and predicts the teacher's latents of all of them, hidden ones included. Colours are the first "
            "three principal components of the teacher's latents, the same for all pictures on this page: equal "
            "colours, like latents. A student trained for a minute gets the kind of surface right, and little detail.",
        ),
        element(
            "div",
            *(forecast_card(forecast, contents.grid, basis) for forecast in contents.forecasts),
            class_="examples",
        ),
        element("h2", "The figures"),
        element("div", measures_table(result), class_="card"),
        element("h2", "What is stored"),
        element(
            "p",
            f"Crop boxes, flips and colour jitter depend on the seed, the image's name and the view's number, and on "
            f"nothing else. Below each view are the {grid} latents that the teacher gave for it.",
        ),
        *(
            stored_card(one, contents.grid, basis, heading=title(one.key), caption="tile and crop boxes")
            for one in contents.stored
        ),
        element(
            "div",
            figure(bytes_chart(contents), "Bytes a view. Latents in three codings, and the view's JPEG for scale."),
            class_="card plot",
        ),
        element("h2", "Training"),
        element(
            "div",
            figure(loss_chart(contents), "Visible plus masked alignment, at every step and as means of epochs."),
            class_="card plot",
        ),
        element("h2", "The same on your own images"),
        element("p", "What ran here, and what to run on a folder of your own. Every command goes on where it was."),
        own_commands(contents.steps),
        element("footer", footer_text()),
    ]
    return page("cae2pipe demo", join(body, "\n"))


def headline(result: Mapping[str, float]) -> Html:
    share = result["bytes_per_view"] / result["bytes_per_view_fp16"]
    cards: list[tuple[Child, Child]] = [
        (f"{share:.0%}", f"of fp16's bytes for the latents, at a mean cosine of {result['fidelity_mean']:.4f}"),
        (f"{result['centred_cosine_masked']:.2f}", "centred cosine with the teacher on hidden patches of test tiles"),
        (
            f"{result['knn_random']:.0%} → {result['knn_pretrained']:.0%}",
            f"test tiles recognised by nearest neighbours, before and after; the teacher: {result['knn_teacher']:.0%}",
        ),
        (
            f"{result['loss_last']:.2f}",
            f"last loss; the mean target everywhere would cost {result['loss_mean_token']:.2f}",
        ),
    ]
    return figures(cards)


def forecast_card(forecast: Forecast, grid: tuple[int, int], basis: ColourBasis) -> Html:
    view = resized(forecast.view, SHOWN, SHOWN)
    name = title(forecast.key)
    panels = [
        figure(image(jpeg_uri(view), f"A view of {name}"), "view"),
        figure(
            image(jpeg_uri(hide_patches(view, forecast.mask)), "The view with its masked patches hidden"),
            "visible to it",
        ),
        figure(latents_image(forecast.teacher, grid, basis, "the teacher"), "teacher"),
        figure(latents_image(forecast.student, grid, basis, "the student"), "student"),
    ]
    heading = element("h3", name, " ", element("small", f"centred cosine where hidden {forecast.cosine:.2f}"))
    return element("div", heading, element("div", *panels, class_="strip four"), class_="card")


def measures_table(result: Mapping[str, float]) -> Html:
    lines: list[list[Child]] = []
    for measure in MEASURES:
        met = measure.met(result)
        goal = join((measure.show_goal(result), " ", mark(met))) if met is not None else None
        lines.append([measure.name, measure.show(result), goal, measure.meaning])
    return table(["measure", "value", "goal", "meaning"], lines, "texts")


def loss_chart(contents: Contents) -> Html:
    xs, ys = zip(*contents.losses, strict=True)
    epochs = sorted({int(x) for x in xs})
    means = [float(np.mean([y for x, y in contents.losses if int(x) == epoch])) for epoch in epochs]
    return curves(
        {"every step": Points(xs, ys, pale=True), "means of epochs": Points([e + 0.5 for e in epochs], means)},
        x_label="epoch",
        y_label="loss",
        levels={"the mean target everywhere": contents.result["loss_mean_token"]},
    )


def bytes_chart(contents: Contents) -> Html:
    sizes = contents.bytes_per_view
    names = {"fp16": "latents, fp16", "int8": "latents, int8", "stored": f"latents, {contents.codec} (stored)"}
    names["pixels"] = "pixels, JPEG"
    rows = [
        (
            text,
            sizes[name] / 1000,
            f"{sizes[name] / 1000:.1f} kB" + ("" if name == "fp16" else f", {sizes[name] / sizes['fp16']:.0%}"),
        )
        for name, text in names.items()
    ]
    return bars(rows, strong=list(names).index("stored"), x_label="kB a view")


def own_commands(steps: Sequence[Step]) -> Html:
    lines = []
    for step in steps:
        lines.append(element("i", f"# {step.text}\n"))
        lines.append(element("span", f"{step.command}\n\n"))
    own = [
        join((element("i", f"# instead of: {step.command}\n"), f"{step.own}\n\n"))
        for step in steps
        if step.own is not None
    ]
    return join(
        [
            element("pre", join(lines)),
            element("p", "With CLIP as the teacher, and the paper's Base student:"),
            element("pre", join(own)),
        ]
    )


def title(key: str) -> str:
    """``motorcycle_left+03`` as ``motorcycle left, tile 3``."""
    name, _, number = key.partition("+")
    return f"{name.replace('_', ' ')}, tile {int(number)}" if number.isdigit() else key.replace("+", ", ")


def footer_text() -> Html:
    from cae2pipe.version import __version__

    return join(
        (
            f"Made by cae2pipe {__version__}. ",
            "Photographs: those shipped with scikit-image and scikit-learn; china and flower by danielbuechele and "
            "vultilion, CC BY 2.0. Method: CAE v2 (",
            element("a", "openreview.net", href="https://openreview.net/forum?id=f36LaK7MOF"),
            ").",
        )
    )
