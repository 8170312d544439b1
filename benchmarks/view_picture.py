"""The picture of benchmarks/views.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.view_scores import standard_error


def draw(rows: Sequence[dict[str, Any]], images: int, path: Path) -> None:
    """kNN over epochs for every V at 0.999, and the last epoch's scores over bytes, with fresh crops as a level. Bytes
    are those of images kept once, if their size is known."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    plain = [row for row in rows if row["fidelity"] == 0.999]
    counts = sorted({row["views"] for row in plain if not is_fresh(row)})
    shades = plt.get_cmap("viridis_r")
    for arm in dict.fromkeys(row["arm"] for row in sorted(plain, key=lambda row: (is_fresh(row), row["views"]))):
        own = [row for row in plain if row["arm"] == arm]
        fresh, first = is_fresh(own[0]), own[0]["seed"] == 0
        colour = "black" if fresh else shades(0.1 + 0.9 * counts.index(own[0]["views"]) / max(1, len(counts) - 1))
        label = ("fresh crops" if fresh else f"V = {own[0]['views']}") if first else None
        style = "-" if first else ":"
        left.plot(
            [row["epoch"] for row in own], [row["knn"] for row in own], style, color=colour, label=label, linewidth=1.4
        )
    left.set_xlabel("epoch")
    left.set_ylabel("kNN top-1, %")
    left.set_title("stored views at 0.999 (dotted: another seed)")
    if left.lines:
        left.legend(fontsize="small")
    end = max(row["epoch"] for row in rows)
    last = [row for row in rows if row["epoch"] == end and row["seed"] == 0]
    for score, marker, colour in (("knn", "o", "#0072b2"), ("linear", "s", "#d55e00")):
        known = [row for row in last if row[score] is not None]
        for row in known:
            error = standard_error(row[score], images)
            if is_fresh(row):
                right.axhline(row[score], color=colour, linestyle="--", linewidth=1, label=f"{score}, fresh crops")
                right.axhspan(row[score] - error, row[score] + error, color=colour, alpha=0.12, linewidth=0)
        stored = [row for row in known if not is_fresh(row)]
        if not stored:
            continue
        right.errorbar(
            [kilobytes(row) for row in stored],
            [row[score] for row in stored],
            yerr=[standard_error(row[score], images) for row in stored],
            fmt=marker,
            color=colour,
            label=score,
        )
        for row in stored if score == "knn" else ():
            name = row["arm"].removesuffix("-s0")
            right.annotate(name, (kilobytes(row), row[score]), xytext=(4, -10), textcoords="offset points", size=7)
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.set_xlabel("kB per image on disk, latents and pixels")
    right.set_ylabel("top-1, %")
    right.set_title(f"after {end} epochs (bars: one standard error, {images} images)")
    if right.has_data():
        right.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def kilobytes(row: dict[str, Any]) -> float:
    """Kilobytes per image of latents and pixels."""
    return float(row.get("kb_pixels_once", row["kb_per_image"]))


def is_fresh(row: dict[str, Any]) -> bool:
    return bool(row["arm"].startswith("fresh"))
