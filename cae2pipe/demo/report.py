"""The demo's page and picture, made from its measurements and stored data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cae2pipe.demo.measures import measured
from cae2pipe.reporting.html import Child, Html, element, figure, figures, image, join_html, mark, page, table
from cae2pipe.reporting.pictures import (
    ColourBasis,
    Picture,
    captioned,
    colour_basis,
    enlarge,
    hide_patches,
    jpeg_uri,
    latent_colours,
    resized_picture,
    tiled,
)
from cae2pipe.reporting.plots import Points, bars, curves
from cae2pipe.reporting.stored_images import SHOWN, latents_image, stored_card

if TYPE_CHECKING:
    from cae2pipe.targets.stored_image import StoredImage
    from cae2pipe.training.student import LatentPreview

PANEL = 132
"""Side of a panel of the picture in pixels."""


@dataclass(frozen=True)
class DemoCommand:
    """A command that the demo ran, with a sentence on what it does. ``own``: the command for a user's own images."""

    text: str
    line: str
    own: str | None = None


@dataclass(frozen=True)
class DemoContents:
    """The content of the page.

    ``losses`` are points (epoch, loss); ``bytes_per_view`` has the keys ``fp16``, ``int8``, ``stored``, ``pixels``.
    """

    teacher: str
    codec: str
    grid: tuple[int, int]
    result: Mapping[str, float]
    losses: Sequence[tuple[float, float]]
    bytes_per_view: Mapping[str, float]
    stored: Sequence[StoredImage]
    previews: Sequence[LatentPreview]
    commands: Sequence[DemoCommand]


def shared_basis(contents: DemoContents) -> ColourBasis:
    """One colour basis for all pictures of latents, from the teacher's."""
    latents = [preview.teacher for preview in contents.previews]
    for one in contents.stored:
        latents += [view.latents for view in one.views]
    return colour_basis(np.concatenate(latents))


def picture(contents: DemoContents, pairs: int = 2) -> Picture:
    """Test tiles in rows of ``pairs``, each as view, masked view, teacher's latents and student's latents."""
    basis = shared_basis(contents)
    rows, cols = contents.grid
    groups = []
    for preview in contents.previews:
        view = resized_picture(preview.view, PANEL, PANEL)
        maps = [latent_colours(latents, rows, cols, basis=basis) for latents in (preview.teacher, preview.student)]
        groups.append([view, hide_patches(view, preview.mask), *(enlarge(m, PANEL, PANEL) for m in maps)])
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
        for column, text in enumerate(("view", "visible", "teacher", "student")):
            captions.append((left + column * (PANEL + 6) + PANEL // 2, text))
        left += strip.shape[1]
    return captioned(np.concatenate(strips, axis=1), captions)


def demo_page(contents: DemoContents) -> str:
    """The page, one self-contained file."""
    basis = shared_basis(contents)
    result = contents.result
    grid = " × ".join(str(side) for side in contents.grid)
    body = [
        element("h1", "A vision transformer pretrained from cached targets"),
        element(
            "p",
            f"The teacher, {contents.teacher}, saw {result['views']:,.0f} views of each of {result['images']:,.0f} "
            "tiles, once. Its latents were compressed and stored with the pixels. The student was trained only from "
            "that store.",
            class_="lead",
        ),
        headline(result),
        element("h2", "What the student predicts"),
        element(
            "p",
            "Test tiles, cut from a part of each photograph that was not used in training. The student sees "
            "the visible patches and predicts the teacher's latents of all patches, including masked ones. Colours are "
            "the first three principal components of the teacher's latents, the same for all pictures on this page: "
            "similar colours mean similar latents. After a minute of training a student predicts the kind of surface, "
            "but little detail.",
        ),
        element(
            "div",
            *(preview_card(preview, contents.grid, basis) for preview in contents.previews),
            class_="examples",
        ),
        element("h2", "Figures"),
        element("div", measures_table(result), class_="card"),
        element("h2", "What is stored"),
        element(
            "p",
            f"Crop boxes, flips and colour jitter depend only on the seed, the image's name and the view's number. "
            f"Below each view are the {grid} latents that the teacher computed for it.",
        ),
        *(
            stored_card(one, contents.grid, basis, heading=title(one.key), caption="tile and crop boxes")
            for one in contents.stored
        ),
        element(
            "div",
            figure(
                bytes_chart(contents), "Bytes per view: latents with three codecs, and the view's JPEG for comparison."
            ),
            class_="card plot",
        ),
        element("h2", "Training"),
        element(
            "div",
            figure(loss_chart(contents), "Visible plus masked alignment, for every step and as mean per epoch."),
            class_="card plot",
        ),
        element("h2", "Running this on your own images"),
        element(
            "p",
            "The commands of this demo, and those for a folder of your own. Every command resumes if it is "
            "interrupted.",
        ),
        own_commands(contents.commands),
        element("footer", footer_text()),
    ]
    return page("cae2pipe demo", join_html(body, "\n"))


def headline(result: Mapping[str, float]) -> Html:
    share = result["bytes_per_view"] / result["bytes_per_view_fp16"]
    cards: list[tuple[Child, Child]] = [
        (f"{share:.0%}", f"of the bytes of fp16 latents, at a mean cosine of {result['fidelity_mean']:.4f}"),
        (f"{result['centred_cosine_masked']:.2f}", "centred cosine with the teacher on masked patches of test tiles"),
        (
            f"{result['knn_random']:.0%} → {result['knn_pretrained']:.0%}",
            "of test tiles recognised by nearest neighbours, before and after training; teacher: "
            f"{result['knn_teacher']:.0%}",
        ),
        (
            f"{result['loss_last']:.2f}",
            f"final loss; predicting the mean target everywhere: {result['loss_mean_token']:.2f}",
        ),
    ]
    return figures(cards)


def preview_card(preview: LatentPreview, grid: tuple[int, int], basis: ColourBasis) -> Html:
    view = resized_picture(preview.view, SHOWN, SHOWN)
    name = title(preview.key)
    panels = [
        figure(image(jpeg_uri(view), f"A view of {name}"), "view"),
        figure(
            image(jpeg_uri(hide_patches(view, preview.mask)), "The view with masked patches hidden"),
            "visible",
        ),
        figure(latents_image(preview.teacher, grid, basis, whose="the teacher"), "teacher"),
        figure(latents_image(preview.student, grid, basis, whose="the student"), "student"),
    ]
    heading = element("h3", name, " ", element("small", f"centred cosine on masked patches {preview.cosine:.2f}"))
    return element("div", heading, element("div", *panels, class_="strip four"), class_="card")


def measures_table(result: Mapping[str, float]) -> Html:
    lines: list[list[Child]] = []
    for measure in measured(result):
        met = measure.met(result)
        goal = join_html((measure.show_goal(result), " ", mark(met))) if met is not None else None
        lines.append([measure.name, measure.show(result), goal, measure.meaning])
    return table(["measure", "value", "goal", "meaning"], lines, "texts")


def loss_chart(contents: DemoContents) -> Html:
    xs, ys = zip(*contents.losses, strict=True)
    epochs = sorted({int(x) for x in xs})
    means = [float(np.mean([y for x, y in contents.losses if int(x) == epoch])) for epoch in epochs]
    return curves(
        {"every step": Points(xs, ys, pale=True), "mean per epoch": Points([e + 0.5 for e in epochs], means)},
        x_label="epoch",
        y_label="loss",
        levels={"mean target everywhere": contents.result["loss_mean_token"]},
    )


def bytes_chart(contents: DemoContents) -> Html:
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
    return bars(rows, strong=list(names).index("stored"), x_label="kB per view")


def own_commands(commands: Sequence[DemoCommand]) -> Html:
    lines = []
    for command in commands:
        lines.append(element("i", f"# {command.text}\n"))
        lines.append(element("span", f"{command.line}\n\n"))
    own = [
        join_html((element("i", f"# instead of: {command.line}\n"), f"{command.own}\n\n"))
        for command in commands
        if command.own is not None
    ]
    return join_html(
        [
            element("pre", join_html(lines)),
            element("p", "With CLIP as the teacher, and the paper's Base student:"),
            element("pre", join_html(own)),
        ]
    )


def title(key: str) -> str:
    """``motorcycle_left+03`` as ``motorcycle left, tile 3``."""
    name, _, number = key.partition("+")
    return f"{name.replace('_', ' ')}, tile {int(number)}" if number.isdigit() else key.replace("+", ", ")


def footer_text() -> Html:
    from cae2pipe.version import __version__

    return join_html(
        (
            f"Made by cae2pipe {__version__}. ",
            "Photographs: those shipped with scikit-image and scikit-learn; china and flower by danielbuechele and "
            "vultilion, CC BY 2.0. Method: CAE v2 (",
            element("a", "openreview.net", href="https://openreview.net/forum?id=f36LaK7MOF"),
            ").",
        )
    )
