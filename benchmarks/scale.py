"""What do manifests, plans and the order of an epoch cost for large data sets?

Claim: a target set of the size of ImageNet-21K in four views is opened, and its plan made, in 3 s and 500 MB in the
main process, and in 50 MB in each loader process. The real writer writes the manifests, of stores that are copies of a
real one under other names and digests. Every figure comes from processes of their own: CPU seconds, and peak memory
above that after imports. Sizes that are too large for that are extrapolated from two that are not, and are marked.

    python -m benchmarks.scale [--quick] [--out benchmarks/results/scale-cpu.json]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import at_most, figures, finish, parse_options
from benchmarks.sample import random_weights, write_noise
from cae2pipe.config.base import build
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets

ROOT = Path(__file__).parents[1]
PER_SHARD = 1024
TEACHER = {
    "kind": "open_clip",
    "name": "tiny",
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0},
    "embed_dim": 16,
    "quick_gelu": False,
    "image_size": 32,
}
SETS = [("ImageNet-1K, 8 views", 1_252, 8), ("ImageNet-21K, 4 views", 12_842, 4)]
"""Name, shards of 1,024 images, views."""
BILLION = ("10^9 images, 4 views", 61_036, 16_384, 4)
"""Name, shards, images of each, views. With 1,024 images per shard the manifest would be too large to be read."""
ENTRIES = 2_000
LISTED = (100_000, 400_000)


def run_part(part: str, **arguments: Any) -> dict[str, Any]:
    """A part's figures, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale_parts", part, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def real_set(scratch: Path, images: int = PER_SHARD) -> Path:
    """A target set of one shard in one view, by the real commands with a tiny teacher."""
    write_noise(scratch / "photographs" / "noise", images, (40, 40))
    weights = random_weights("tiny", scratch, TEACHER)
    values = {
        "teacher": {**TEACHER, "weights": str(weights)},
        "views": 1,
        "view": {"size": 32},
        "codec": {"calibration": 64},
        "shard": {"samples": images, "speed": {"workers": 0}},
        "speed": {"workers": 0, "device": "cpu"},
    }
    settings = build(ExtractSettings, values, "scale")
    extract_targets(scratch / "photographs", scratch / "real", settings, report=Silent())
    return scratch / "real"


def repeated(rounds: int, part: str, **arguments: Any) -> dict[str, Any]:
    """A part's figures with ``s`` and ``mb`` as medians over rounds, each with its spread."""
    results = [run_part(part, **arguments) for _ in range(rounds)]
    spread = {name: figures([result[name] for result in results], 2) for name in ("s", "mb")}
    return {**results[-1], **spread}


def measure_set(real: Path, root: Path, name: str, shards: int, views: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one made-up set."""
    made = run_part("make", real=str(real), root=str(root), shards=shards, views=views)
    rows = [row(name, "writing the manifest", made, made["s"], mb=None, file=made["bytes"])]
    reading = repeated(rounds, "read", root=str(root))
    rows.append(row(name, "reading the manifest", reading, reading["s"], mb=reading["mb"]))
    opened = repeated(rounds, "main", root=str(root))
    rows.append(row(name, "main process: opening the set, making the plan", opened, opened["s"], mb=opened["mb"]))
    rows.append(row(name, "pickling the plan for a worker", opened, opened["pickle_s"], file=opened["plan_mb"] * 1e6))
    own = repeated(rounds, "worker", root=str(root))
    rows.append(row(name, "worker: its plan, and its streams' first samples", own, own["s"], mb=own["mb"]))
    shutil.rmtree(root)
    return [{**each, "units": made["units"]} for each in rows]


def row(size: str, what: str, part: dict[str, Any], seconds: Any, mb: Any = None, file: float | None = None) -> dict:
    """A row of the result."""
    shown = figures([seconds], 3) if isinstance(seconds, float) else seconds
    return {
        "size": size,
        "what": what,
        "s": shown,
        **({"mb": mb} if mb is not None else {}),
        **({"file_mb": round(file / 1e6, 2)} if file is not None else {}),
    }


def extrapolated(name: str, units: int, small: Sequence[dict], large: Sequence[dict]) -> list[dict[str, Any]]:
    """Rows for another number of units, along the line through two measured sizes."""
    rows = []
    for one, two in zip(small, large, strict=True):
        if "plan for a worker" in two["what"] or "worker:" in two["what"]:
            continue  # does not grow with the units
        more = (units - two["units"]) / (two["units"] - one["units"])

        def at(a: float, b: float, more: float = more) -> float:
            return b + more * (b - a)

        line: dict[str, Any] = {"size": name, "what": two["what"], "extrapolated": True, "units": units}
        line["s"] = figures([at(one["s"]["median"], two["s"]["median"])], 1)
        if "mb" in two:
            line["mb"] = figures([at(one["mb"]["median"], two["mb"]["median"])], 0)
        if "file_mb" in two:
            line["file_mb"] = round(at(one["file_mb"], two["file_mb"]))
        rows.append(line)
    return rows


def listing_rows(scratch: Path, sizes: Sequence[int], wanted: dict[str, int]) -> list[dict[str, Any]]:
    """Stage 1's listing of images: measured at ``sizes``, and along the line through them for the data sets."""
    found = [run_part("listing", root=str(scratch / f"listed-{size}"), images=size) for size in sizes]
    rows = []
    for name, images in {**{f"{size:,} images": size for size in sizes}, **wanted}.items():
        more = (images - sizes[1]) / (sizes[1] - sizes[0])
        at = {key: found[1][key] + more * (found[1][key] - found[0][key]) for key in ("s", "again_s", "mb", "bytes")}
        what = "stage 1: listing the source, written and compared"
        line = row(name, what, {}, at["s"], mb=figures([at["mb"]], 0), file=at["bytes"])
        rows.append(line if images in sizes else {**line, "extrapolated": True})
    return rows


def main() -> None:
    options = parse_options(__doc__)
    rounds = 1 if options.quick else 5
    name, shards, samples, views = BILLION
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        real = real_set(scratch)
        sets = [measure_set(real, scratch / "made", *each, rounds=rounds) for each in SETS]
        entries = run_part("merge", real=str(real), root=str(scratch / "merged"), entries=ENTRIES)
        shutil.rmtree(scratch / "merged")
        order = repeated(rounds, "order", shards=shards, samples=samples, views=views)
        images = {name: each * PER_SHARD for name, each, _ in SETS} | {name: shards * samples}
        listed = listing_rows(scratch, LISTED, images)
    rows = [each for rows in sets for each in rows]
    rows += extrapolated(name, shards * (views + 1) + 1, *sets)
    what = "worker: its streams' first samples"
    rows.append(row(name, what, order, order["s"], mb=order["mb"], file=order["list_mb"] * 1e6))
    per_entry = entries["add_s"] / ENTRIES * 1e3
    rows.append({"size": "a store", "what": "writing its journal entry, ms", "s": figures([per_entry], 2)})
    per_entry = entries["s"] / ENTRIES * 1e3
    rows.append({"size": "a store", "what": "merging its journal entry, ms", "s": figures([per_entry], 2)})
    rows += listed
    opened, own = sets[-1][2], sets[-1][4]
    checks = [
        at_most("ImageNet-21K, 4 views: opening the set and making the plan, s", opened["s"]["median"], 3),
        at_most("ImageNet-21K, 4 views: memory of the main process, MB", opened["mb"]["median"], 500),
        at_most("ImageNet-21K, 4 views: memory of a worker, MB", own["mb"]["median"], 50),
    ]
    settings = {"images_per_shard": PER_SHARD, "journal_entries": ENTRIES, "streams": 64, "workers": 16, "window": 4}
    finish(options, "scale", rows, checks, settings, ("torch", "numpy", "pydantic"))


if __name__ == "__main__":
    main()
