"""The page about a target set: plain values to one self-contained document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cae2pipe.artifacts.manifest import REFERRING
from cae2pipe.config.extract import ViewSettings
from cae2pipe.reporting.coverage_grid import coverage_grid
from cae2pipe.reporting.fidelity_section import fidelity_section
from cae2pipe.reporting.html import Child, Html, bar_list, element, facts, figures, join_html, mark, page, table
from cae2pipe.reporting.pictures import ColourBasis, colour_basis
from cae2pipe.reporting.stored_images import stored_card
from cae2pipe.reporting.target_set_facts import codec_rows, provenance_rows, teacher_rows, view_rows
from cae2pipe.reporting.wording import NAMED, listed
from cae2pipe.runtime.progress import gigabytes
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.coverage import ABSENT, DAMAGED, Coverage
from cae2pipe.targets.fidelity_profile import FidelityProfile
from cae2pipe.targets.set_bytes import SetBytes
from cae2pipe.targets.stored_image import StoredImage

FIRST_CLASSES, LAST_CLASSES = 12, 4
"""Numbers of classes that are shown of a long list: the largest and the smallest."""


@dataclass(frozen=True)
class TargetSetContents:
    """What the page shows.

    ``identity``, ``facts``, ``format`` and ``fingerprint`` are the manifest's; ``view``: how views are drawn.
    ``image_count``: of all shards in the manifest. ``fidelity``: means over the ``stores`` that can be read.
    ``array_shapes``: in words, by array. ``classes``: (name, images), None if the set has none; ``unlabelled``: number
    of images without a label. ``rejects``: (path, reason), None without a shard set. ``images``: some stored images,
    each with the caption of its picture; ``originals``: whether the shard set was available. ``profile``: None if the
    teacher was not run. ``problems``: files that could not be read, in words. ``commands``: those that add what is
    missing, by ``source``, ``live``, ``extend`` and ``repair``.
    """

    name: str
    root: str
    identity: Mapping[str, Any]
    facts: Mapping[str, Any]
    format: int
    fingerprint: str
    view: ViewSettings
    image_count: int
    fidelity: Mapping[str, float]
    stores: Mapping[str, Mapping[str, Any]]
    sizes: SetBytes
    array_shapes: Mapping[str, str]
    coverage: Coverage
    classes: Sequence[tuple[str, int]] | None
    unlabelled: int
    rejects: Sequence[tuple[str, str]] | None
    images: Sequence[tuple[StoredImage, str]]
    originals: bool
    profile: FidelityProfile | None
    problems: Sequence[str]
    commands: Mapping[str, str]

    @property
    def grid(self) -> tuple[int, int]:
        return self.facts["teacher"]["rows"], self.facts["teacher"]["cols"]

    @property
    def asked(self) -> float | None:
        """The requested mean cosine; None for codecs without that setting."""
        codec = self.identity["settings"]["codec"]
        return codec["fidelity"] if codec["name"] == "klt" else None


def target_set_html(contents: TargetSetContents) -> str:
    """The page."""
    latents = [view.latents for stored, _ in contents.images for view in stored.views]
    if contents.profile is not None:
        latents += [view.true for view in contents.profile.worst]
    basis = colour_basis(np.concatenate(latents)) if latents else None
    body = [
        element("h1", f"Target set {contents.name}"),
        element("p", lead(contents), class_="lead"),
        headline(contents),
        *problems_section(contents),
        element("h2", "Facts"),
        element("div", facts(fact_rows(contents)), class_="card"),
        *images_section(contents, basis),
        *fidelity_section(
            contents.stores,
            contents.fidelity,
            contents.asked,
            held_out=contents.facts["codec"]["held_out_fidelity"],
            profile=contents.profile,
            grid=contents.grid,
            basis=basis,
            live_command=contents.commands["live"],
        ),
        *bytes_section(contents),
        *coverage_section(contents),
        *classes_section(contents),
        *rejects_section(contents),
        element("footer", footer_text()),
    ]
    return page(f"Target set {contents.name}", join_html(body, "\n"))


def lead(contents: TargetSetContents) -> str:
    coverage = contents.coverage
    return (
        f"Latents of {contents.facts['teacher']['name']} for up to {coverage.views} views of each of "
        f"{counted(contents.image_count, 'image')}, stored with codec {contents.identity['settings']['codec']['name']}."
    )


def headline(contents: TargetSetContents) -> Html:
    sizes, coverage = contents.sizes, contents.coverage
    present = float((coverage.cells == 1).mean())
    cards: list[tuple[Child, Child]] = [
        (f"{sizes.views:,}", f"stored views, of {counted(contents.image_count, 'image')}"),
        (f"{contents.fidelity['mean']:.4f}", "recorded mean cosine between stored latents and the teacher's"),
        (gigabytes(sizes.total), f"on disk: {gigabytes(sizes.total / sizes.views)} per view"),
        (f"{sizes.latents / sizes.fp16:.0%}", "of the bytes of fp16 latents"),
        (f"{floor_percent(present)}%", "of the requested stores exist"),
    ]
    return figures(cards)


def floor_percent(share: float) -> int:
    """A share in percent, rounded down: 100 only if nothing is missing."""
    return int(share * 100 + 1e-9)


def problems_section(contents: TargetSetContents) -> list[Html]:
    """Missing and damaged stores, with the commands that make or repair them."""
    coverage = contents.coverage
    parts: list[Html] = []
    if absent := coverage.names(ABSENT):
        parts.append(element("p", f"{counted(len(absent), 'store')} of {coverage.cells.size} do not exist yet: "
                             f"{listed(absent)}."))  # fmt: skip
        parts.append(element("pre", contents.commands["extend"]))
    damaged = coverage.names(DAMAGED)
    if damaged or contents.problems:
        if damaged:
            text = f"{counted(len(damaged), 'store')} cannot be used, because a file is missing or truncated: "
            parts.append(element("p", f"{text}{listed(damaged)}."))
        lines = [element("li", problem) for problem in contents.problems[:NAMED]]
        if len(contents.problems) > NAMED:
            lines.append(element("li", f"and {len(contents.problems) - NAMED} more"))
        if lines:
            parts.append(element("ul", *lines))
        parts.append(element("pre", contents.commands["repair"]))
    return [element("h2", "Missing or damaged"), element("div", *parts, class_="card")] if parts else []


def fact_rows(contents: TargetSetContents) -> list[tuple[str, Child]]:
    coverage = contents.coverage
    asked: list[tuple[str, Child]] = []
    if contents.asked is not None:
        reached = contents.fidelity["mean"]
        text = f"mean cosine {contents.asked:g}; stored {reached:.5f} "
        asked = [("requested fidelity", join_html((text, mark(reached >= contents.asked))))]
    held = (
        f"{counted(coverage.cells.shape[1], 'shard')} of {counted(contents.image_count, 'image')}, "
        f"{counted(coverage.views, 'view')} each"
    )
    return [
        ("folder", contents.root),
        ("content", held + ("" if coverage.complete else ", incomplete")),
        *teacher_rows(contents.identity, contents.facts),
        *view_rows(
            contents.view,
            contents.identity["settings"].get("seed", "not recorded"),
            by_reference=contents.format >= REFERRING,
        ),
        *codec_rows(contents.identity, contents.facts),
        *asked,
        *provenance_rows(contents.facts, format=contents.format, fingerprint=contents.fingerprint),
    ]


def images_section(contents: TargetSetContents, basis: ColourBasis | None) -> list[Html]:
    """Some images, their views, and the stored latents."""
    parts = [element("h2", "Views and the teacher's latents")]
    if basis is None:
        return [*parts, element("p", "No view could be read.")]
    rows, cols = contents.grid
    parts.append(
        element(
            "p",
            "Images from all parts of the set, with the crop boxes of their views. Views are shown as the student sees "
            f"them, flipped and with colour jitter. Below each view are its {rows} × {cols} stored latents. Colours "
            "are their first three principal components, with one basis for the whole page: similar colours mean "
            "similar latents.",
        )
    )
    if not contents.originals:
        kept = any(stored.picture is not None for stored, _ in contents.images)
        drawn = "on the reduced images of the set" if kept else "on grey, because this set has no whole images"
        text = f"Boxes are drawn {drawn}. To draw them on the originals, give the shard set:"
        parts += hint(text, contents.commands["source"])
    for stored, caption in contents.images:
        size = f"{stored.width} × {stored.height} pixels"
        heading = join_html((stored.key, " ", element("small", size)))
        parts.append(stored_card(stored, contents.grid, basis, heading=heading, caption=caption))
    return parts


def bytes_section(contents: TargetSetContents) -> list[Html]:
    """Bytes per view and in total, compared with fp16 and int8."""
    sizes = contents.sizes
    rows: list[list[Child]] = []

    def row(name: str, shape: str, size: int) -> None:
        rows.append([name, gigabytes(size / sizes.views), gigabytes(size), f"{size / sizes.total:.1%}", shape])

    for name, size in sizes.arrays.items():
        row(name, contents.array_shapes.get(name, ""), size)
    row("pixels", "JPEG files in tars", sizes.pixels)
    row("other", "calibration, indices of images", sizes.other)
    row("total", "", sizes.total)
    bars = [
        (name, size / sizes.views, f"{gigabytes(size / sizes.views)}, {size / sizes.fp16:.0%}")
        for name, size in (
            ("latents as stored", sizes.latents),
            ("latents, int8", sizes.int8),
            ("latents, fp16", sizes.fp16),
            ("pixels", sizes.pixels),
        )
    ]
    return [
        element("h2", "Bytes"),
        element("p", f"Per view, and relative to fp16 latents. {sizes.views:,} views are stored."),
        element("div", bar_list(bars), class_="card"),
        element("div", table(["array", "per view", "total", "share", "shape per view"], rows, "scores"), class_="card"),
    ]


def coverage_section(contents: TargetSetContents) -> list[Html]:
    return [
        element("h2", "Coverage"),
        element("p", "A store holds one view of each image of a shard."),
        element("div", coverage_grid(contents.coverage), class_="card"),
    ]


def classes_section(contents: TargetSetContents) -> list[Html]:
    """Images of every class; the middle of a long list is collapsed."""
    parts = [element("h2", "Classes")]
    if contents.classes is None:
        return [*parts, element("p", "The images have no classes. Pretraining needs none.")]
    rows = class_bars(contents.classes)
    if contents.unlabelled:
        rows.append(("no class", float(contents.unlabelled), f"{contents.unlabelled:,}"))
    empty = sum(count == 0 for _, count in contents.classes)
    text = f"Images of each of {counted(len(contents.classes), 'class', 'classes')}, most first"
    text += f"; {empty:,} without images." if empty else "."
    return [*parts, element("p", text), element("div", bar_list(rows), class_="card")]


def class_bars(classes: Sequence[tuple[str, int]]) -> list[tuple[str, float, str]]:
    """One bar per class, most images first. In a long list, the classes between the largest and the smallest share a
    bar, which shows their mean."""
    rows = [(name, float(count), f"{count:,}") for name, count in classes]
    hidden = rows[FIRST_CLASSES : len(rows) - LAST_CLASSES]
    if len(hidden) < 2:
        return rows
    mean = sum(value for _, value, _ in hidden) / len(hidden)
    most, least = hidden[0][2], hidden[-1][2]
    between = f"{most} each" if most == least else f"{least} to {most} each"
    middle = (f"{len(hidden):,} more classes", mean, between)
    return [*rows[:FIRST_CLASSES], middle, *rows[len(rows) - LAST_CLASSES :]]


def rejects_section(contents: TargetSetContents) -> list[Html]:
    """Images of the source that could not be decoded, by reason."""
    parts = [element("h2", "Rejected images")]
    if contents.rejects is None:
        text = (
            "Images that could not be decoded are listed in the shard set, which is not inside this set. To show them:"
        )
        return [*parts, *hint(text, contents.commands["source"])]
    if not contents.rejects:
        return [*parts, element("p", "None: every image of the source could be decoded.")]
    reasons = Counter(reason for _, reason in contents.rejects)
    examples = dict(reversed([(reason, path) for path, reason in contents.rejects]))
    rows: list[list[Child]] = [
        [reason, f"{count:,}", examples[reason]]
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:NAMED]
    ]
    if len(reasons) > NAMED:
        others = len(contents.rejects) - sum(reasons[str(row[0])] for row in rows)
        rows.append([f"{len(reasons) - NAMED:,} more reasons", f"{others:,}", ""])
    return [
        *parts,
        element("p", f"{counted(len(contents.rejects), 'image')} of the source could not be decoded."),
        element("div", table(["reason", "images", "first image"], rows), class_="card"),
    ]


def hint(text: str, command: str) -> list[Html]:
    """A text on what is not on the page, and the command that adds it."""
    return [element("p", text, class_="small"), element("pre", command)]


def footer_text() -> str:
    from cae2pipe.version import __version__

    return f"Made by cae2pipe {__version__}."
