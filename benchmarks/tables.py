"""Tables of figures in README.md and docs/, generated from the JSON files in benchmarks/results/.

A table is between two comments, ``<!-- figures: NAME -->`` and ``<!-- figures end -->``.

    python -m benchmarks.tables            # print them
    python -m benchmarks.tables --write    # put them between the comments
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper_tables import paper_orders
from benchmarks.score_tables import several_teachers, teacher_grid, teacher_step, teacher_tour, teachers, views
from benchmarks.table_parts import check, goal, read, significant, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n)((?:(?!<!-- figures).)*?)(\n<!-- figures end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/")
    if parser.parse_args().write:
        for path in pages():
            path.write_text(filled(path.read_text(), RESULTS))
        return
    for name, make in TABLES.items():
        print(f"{name}\n\n{make(RESULTS)}\n")


def pages() -> list[Path]:
    """Pages that may contain tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, results: Path) -> str:
    """A page with its tables generated from the results."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]](results) + match[4], text)


def performance(results: Path) -> str:
    """Ratios and rates that have a goal, on a CPU."""
    pareto, loader, extraction = (read(results, name) for name in ("codec_pareto", "loader", "extraction"))
    store = read(results, "store_read")
    klt = next(row for row in pareto["rows"] if row["codec"] == "klt 0.999")
    rows = [
        (f"klt at 0.999: bytes against int8 (1st percentile {klt['p1']:.4f})", check(pareto, "of int8's"), 3, ""),
        ("klt: unpacking, views/s per core", check(pareto, "unpacking"), 3, ""),
        ("int8 blocks: time against plain reading and CRC-32C", check(store, "StoreReader"), 3, ""),
        ("klt blocks: speed against an earlier format, 512 dimensions", check(store, "earlier"), 3, ""),
        ("block loader, stored views, against full-size photographs, one core", check(loader, "stored"), 2, ""),
        ("block loader, replayed views, against the same", check(loader, "replayed"), 2, ""),
        ("extraction against the teacher's forward, two cores", check(extraction, "extraction"), 2, ""),
    ]
    return table(
        ("what", "figure", "goal"),
        [(what, significant(row["value"], digits), goal(row, why)) for what, row, digits, why in rows],
    )


def rendering(results: Path) -> str:
    """Images and views per second of processor time, and those of an earlier version."""
    result = read(results, "rendering")
    rows = [
        (
            row["what"],
            significant(row["per second and core"]["median"], 3),
            significant(row["before"]["median"], 3),
            f"{row['times']:.2f}",
        )
        for row in result["rows"]
    ]
    return table(("what", "per second and core", "before", "times"), rows)


def low_rate(results: Path) -> str:
    """Bytes per view of the latent codec and of alternatives, at equal cosines."""
    result = read(results, "codec_low_rate")
    fidelities = ("0.999", "0.99", "0.97", "0.95", "0.9")
    rows = [
        (
            row["method"],
            *(f"{row[fidelity]:,}" if fidelity in row else "" for fidelity in fidelities),
        )
        for row in result["rows"]
        if row["pixels"] == 224
    ]
    return table(("mean cosine", *fidelities), rows)


def reduced_views(results: Path) -> str:
    """Bytes and loading time of views of 448 pixels and of 224."""
    rows = [row for row in read(results, "reduced_views")["rows"] if not row["what"].startswith("the same")]
    return table(
        ("views", "kB per view or image", "loading, ms"),
        [(row["what"], f"{row['kB']:.0f}", f"{row['ms']['median']:.1f}") for row in rows],
    )


def training(results: Path) -> str:
    """Images per second of every size on a CPU, from memory, cached and online."""
    result = read(results, "pretrain")
    heads = ("size", "memory", "cached", "online, stored views", "online, fresh crops")
    rows = [
        (
            row["size"].capitalize(),
            *(rate(row[name]) for name in ("memory", "cached", "online", "fresh")),
            f"{row['/memory']:.2f}",
            significant(row["/online"], 2),
            significant(row["ceiling"], 2),
        )
        for row in result["rows"]
    ]
    return table((*heads, "cached / memory (goal 0.95)", "cached / online", "ceiling"), rows)


def hours(results: Path) -> str:
    """Hours of 300 epochs of ImageNet-1K, computed from the rates."""
    computed = read(results, "pretrain")["settings"]["computed_hours"]
    names = [name for name in computed[0] if name != "size"]
    rows = [(row["size"].capitalize(), *(f"{row[name]:,}" for name in names)) for row in computed]
    return table(("size", *(name.replace("V=", "V = ") for name in names)), rows)


def scale(results: Path) -> str:
    """CPU seconds and memory that manifests and plans take at three sizes."""
    result = read(results, "scale")
    rows = [row for row in result["rows"] if "views" in row["size"]]
    sizes, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("size", "what"))
    cells = {(row["what"], row["size"]): scale_cell(row) for row in rows}
    return table(("what", *sizes), [(what, *(cells.get((what, size), "") for size in sizes)) for what in kinds])


def scale_cell(row: dict[str, Any]) -> str:
    """Seconds, memory and the file's size of a row, in italics if they are extrapolated."""
    parts = [f"{significant(row['s']['median'], 2)} s"]
    if "mb" in row:
        parts.append(f"{significant(row['mb']['median'], 3, most=0)} MB")
    if "file_mb" in row:
        parts.append(f"{significant(row['file_mb'], 2)} MB written")
    text = ", ".join(parts)
    return f"*{text}*" if row.get("extrapolated") else text


def feed(results: Path) -> str:
    """Images per second of a core from loaders, and how a student waits that takes batches at 0.9 of their rate."""
    if not (results / "feed-cpu.json").exists():
        return "Nothing has been measured."
    result = read(results, "feed")
    rows = [
        (
            row["loader"],
            str(row["workers"]),
            rate(row["images/s per core"]),
            f"{100 * row['waited']:.1f}%" if "waited" in row else "",
            significant(row["slowest / median"], 3, most=1) if "waited" in row else "",
        )
        for row in result["rows"]
    ]
    claims = [(row["name"], significant(row["value"], 3, most=2), goal(row, "")) for row in result["checks"]]
    return (
        table(("loader", "workers", "images/s per core", "waited", "slowest / median batch"), rows)
        + "\n\n"
        + table(("what", "figure", "goal"), claims)
    )


CORES, EPOCHS, IMAGES = 16, 300, 1_281_167
"""Of the projection: an H100's share of a machine's cores, and ImageNet-1K's training set."""


def projection(results: Path) -> str:
    """What limits pretraining on one H100 with 16 cores, from rates that were measured apart."""
    if not (results / "feed-cpu.json").exists():
        return "Nothing has been measured."
    loaders = [row for row in read(results, "feed")["rows"] if row["loader"] == "this checkout"]
    per_core = max(loaders, key=lambda row: row["workers"])["images/s per core"]["median"]
    parts = json.loads((results / "gpu-h100.json").read_text())["parts"]
    steps = [row for name, part in parts.items() if name.startswith("C-") for row in part["found"].get("rows", [])]
    rows = []
    for row in sorted(steps, key=lambda row: -row["images/s"]["median"]):
        step, fed = row["images/s"]["median"], CORES * per_core
        hours = EPOCHS * IMAGES / min(step, fed) / 3600
        rows.append(
            (
                row["size"].capitalize(),
                significant(step, 3),
                significant(fed, 3),
                f"{step / per_core:.1f}",
                "the GPU" if step < fed else "the cores",
                significant(hours, 2),
            )
        )
    names = ("size", "the step takes", "16 cores load", "cores needed", "limit", "hours of 300 epochs")
    return table(names, rows)


def gpu(results: Path) -> str:
    """What was measured on GPUs, a table for each."""
    contents = [json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json"))]
    return "\n\n".join(gpu_table(each) for each in contents) or "Nothing has been measured on a GPU."


def gpu_table(content: dict[str, Any]) -> str:
    """Training, loading and extraction on one device."""
    versions, parts = content["versions"], content["parts"]
    said = (
        f"{content['device']}, {content['started'][:10]}, PyTorch {versions['torch']}, Python {versions['python']} "
        f"(`python -m benchmarks.gpu`; {', '.join(sorted(set(content['stand_ins'].values())))}):"
    )
    rows = [
        (f"{row['size'].capitalize()}, {row['variant']}, batch {row['batch']}", rate(row["images/s"]), share(row))
        for name, part in parts.items()
        if name.startswith("C-")
        for row in part["found"].get("rows", [])
    ]
    rows += [
        (
            f"Base fed {row['fed']}, {row['views']} views, batch {row['batch']}",
            rate(row["images/s"]),
            of(row, "/memory", "of that from memory"),
        )
        for name in ("D-stored", "D-replayed")
        for row in measured(parts, name)
    ]
    views = measured(parts, "V")
    rows += [
        (f"views: {row['what']}, batch {row['batch']}", rate(row["views/s"]), "")
        for row in views
        if row["batch"] == max(row["batch"] for row in views)
    ]
    rows += [
        (row["what"], rate(row["views/s"]), of(row, "teacher_waits", "of the time the teacher waits"))
        for row in measured(parts, "E3")
    ]
    return f"{said}\n\n" + table(("what", "images or views/s", "also"), rows)


def measured(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A part's rows; empty if it did not run."""
    rows: list[dict[str, Any]] = parts.get(name, {}).get("found", {}).get("rows", [])
    return rows


def rate(figures: dict[str, Any]) -> str:
    """A rate's median. Files have two places."""
    return significant(figures["median"], 3, most=2)


def share(row: dict[str, Any]) -> str:
    """MFU and peak memory of a training row."""
    mfu = "" if row["mfu"] is None else f"MFU {row['mfu']:.2f}, "
    return f"{mfu}{row['memory_gb']:.0f} GB"


def of(row: dict[str, Any], name: str, what: str) -> str:
    return f"{row[name]:.2f} {what}" if name in row else ""


TABLES: dict[str, Callable[[Path], str]] = {
    "performance": performance,
    "rendering": rendering,
    "low_rate": low_rate,
    "views": views,
    "reduced_views": reduced_views,
    "teacher_grid": teacher_grid,
    "paper_orders": paper_orders,
    "several_teachers": several_teachers,
    "teacher_step": teacher_step,
    "training": training,
    "hours": hours,
    "scale": scale,
    "feed": feed,
    "projection": projection,
    "gpu": gpu,
    "teachers": teachers,
    "teacher_tour": teacher_tour,
}
"""Tables by their names in the comments."""

if __name__ == "__main__":
    main()
