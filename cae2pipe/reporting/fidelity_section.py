"""Fidelity of stored latents: the recorded one, and that of views on which the teacher is run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cae2pipe.reporting.html import Child, Html, element, figure, figures, image, table
from cae2pipe.reporting.pictures import ColourBasis, heat_map, jpeg_uri, png_uri, resized_picture
from cae2pipe.reporting.plots import Points, curves
from cae2pipe.reporting.stored_images import SHOWN, latents_image
from cae2pipe.targets.fidelity_profile import FidelityProfile, LiveView

WORST_STORES = 5


def fidelity_section(
    stores: Mapping[str, Mapping[str, Any]],
    fidelity: Mapping[str, float],
    asked: float | None,
    *,
    held_out: Mapping[str, float],
    profile: FidelityProfile | None,
    grid: tuple[int, int],
    basis: ColourBasis | None,
    live_command: str,
) -> list[Html]:
    """The section on fidelity.

    Args:
        stores: samples and recorded fidelity of each store. fidelity: their mean. asked: the requested mean cosine.
        held_out: the calibration's result on images that it was not fitted to. profile: of views on which the teacher
            was run again, or None; ``live_command`` adds it.
    """
    goal = "" if asked is None else f" The requested mean cosine is {asked:g}."
    parts = [
        element("h2", "Fidelity"),
        element(
            "p",
            "Cosines between stored latents and the teacher's, recorded during extraction. Centred cosines, with the "
            f"set's mean token subtracted, are the stricter measure.{goal}",
        ),
        element("div", store_table(stores, fidelity, held_out), class_="card"),
    ]
    if profile is None:
        text = (
            "Not on this page: fidelity by principal component and by token, and the views with the lowest cosine. "
            "This command runs the teacher on some stored views to add them (add --teacher-weights FILE if its weights "
            "came from a file):"
        )
        return [*parts, element("p", text, class_="small"), element("pre", live_command)]
    return [*parts, *live_parts(profile, grid, basis, recorded=fidelity["mean"])]


def store_table(
    stores: Mapping[str, Mapping[str, Any]], fidelity: Mapping[str, float], held_out: Mapping[str, float]
) -> Html:
    """The recorded fidelity of the calibration, the whole set, and the worst stores."""

    def row(name: str, samples: str, values: Mapping[str, float]) -> list[Child]:
        shown = (values[key] for key in ("mean", "p1", "centred_mean", "centred_p1"))
        return [name, samples, *(f"{value:.5f}" for value in shown)]

    views = sum(unit["samples"] for unit in stores.values())
    worst = sorted(stores.items(), key=lambda item: (item[1]["fidelity"]["mean"], item[0]))[:WORST_STORES]
    rows = [row("calibration, held out", "", held_out), row("all stores", f"{views:,}", fidelity)]
    title = "store" if len(worst) == len(stores) else "worst"
    rows += [row(f"{title} {name}", f"{unit['samples']:,}", unit["fidelity"]) for name, unit in worst]
    return table(
        ["stores", "views", "mean", "1st percentile", "centred mean", "centred 1st percentile"], rows, "scores"
    )


def live_parts(
    profile: FidelityProfile, grid: tuple[int, int], basis: ColourBasis | None, *, recorded: float
) -> list[Html]:
    """Fidelity of the views on which the teacher was run again."""
    lost = int((profile.error > 0.5 * profile.variance).sum())
    count = len(profile.variance)
    patches = profile.by_token[len(profile.by_token) - grid[0] * grid[1] :]
    low, high = float(patches.min()), float(patches.max())
    first = f" Class token: {profile.by_token[0]:.4f}." if len(profile.by_token) > len(patches) else ""
    drawn = png_uri(heat_map(patches.reshape(grid), low, high))
    components = figure(
        component_curves(profile),
        "By component: variance of the teacher's latents along their principal axes, and the mean squared error of "
        "stored latents along the same axes. Where both curves meet, a component is lost.",
    )
    tokens = figure(
        element("div", image(drawn, "Mean centred cosine of each patch", pixelated=True), style="max-width: 18rem"),
        f"By token: mean centred cosine of each patch, {low:.4f} (dark violet) to {high:.4f} (yellow).{first}",
    )
    return [
        element("h3", f"The teacher on {profile.views:,} stored views"),
        figures(
            [
                (f"{profile.raw:.4f}", f"mean cosine now; recorded for the set: {recorded:.4f}"),
                (f"{profile.centred:.4f}", "mean centred cosine"),
                (f"{lost} of {count}", "principal components lose more than half of their variance"),
            ]
        ),
        element(
            "div", element("div", components, class_="card plot"), element("div", tokens, class_="card"), class_="pair"
        ),
        element("h3", "Views with the lowest cosine"),
        element("div", *worst_cards(profile.worst, grid, basis), class_="examples"),
    ]


def component_curves(profile: FidelityProfile) -> Html:
    floor = 1e-7 * float(profile.variance[0])
    xs = range(1, len(profile.variance) + 1)
    return curves(
        {
            "the teacher's latents": Points(xs, profile.variance.tolist()),
            "error of stored latents": Points(xs, np.maximum(profile.error, floor).tolist()),
        },
        x_label="principal component",
        y_label="variance",
    )


def worst_cards(views: Sequence[LiveView], grid: tuple[int, int], basis: ColourBasis | None) -> list[Html]:
    """One card per view; all maps of cosines have the same scale."""
    if basis is None or not views:
        return []
    cosines = np.concatenate([view.cosines for view in views])
    low, high = float(cosines.min()), float(cosines.max())
    return [worst_card(view, grid, basis, low=low, high=high) for view in views]


def worst_card(view: LiveView, grid: tuple[int, int], basis: ColourBasis, *, low: float, high: float) -> Html:
    heat = heat_map(view.cosines.reshape(grid), low, high)
    panels = [
        figure(image(jpeg_uri(resized_picture(view.pixels, SHOWN, SHOWN)), f"View {view.name}"), "view"),
        figure(latents_image(view.true, grid, basis, whose="the teacher"), "teacher"),
        figure(latents_image(view.stored, grid, basis, whose="the set"), "stored"),
        figure(
            image(png_uri(heat), "Centred cosine of each patch", pixelated=True), f"cosine, {low:.2f} to {high:.2f}"
        ),
    ]
    figures_of_view = f"centred cosine {view.centred:.3f}, raw {view.raw:.4f}"
    heading = element("h3", view.name, " ", element("small", figures_of_view))
    return element("div", heading, element("div", *panels, class_="strip four"), class_="card")
