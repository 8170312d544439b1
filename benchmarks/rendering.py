"""How many views per second does one core make and load, and how many did another checkout?

Claim: none. Processor time of the parts that scale with cores: checking originals, rendering and encoding views in
stage 1, and making pixels of what is stored in stage 2. ``--against`` measures the code of another checkout in turns
with this one, and compares the digests of everything made.

    python -m benchmarks.rendering [--quick] [--against CHECKOUT] [--out benchmarks/results/rendering-cpu.json]
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import figures, finish, median_ratio, parse_options
from benchmarks.sample import packed, photographs, settings
from cae2pipe.images import kept
from cae2pipe.shards.checking import FileSlice, check_image
from cae2pipe.targets.rendering import Renderer, Task

VIEWS = 8
IMAGES = 64


def view_into(jpeg: bytes, draw: np.ndarray, replayed: Any, row: np.ndarray) -> None:
    """``kept.view_into``, or what did its work in checkouts without it."""
    if hasattr(kept, "view_into"):
        kept.view_into(jpeg, draw, replayed, row)
    else:
        row[...] = kept.view_pixels(jpeg, draw, replayed, size=len(row))


def main() -> None:
    options = parse_options(
        __doc__,
        against={"type": Path, "metavar": "CHECKOUT", "help": "measure the code of this folder as well"},
        here={"action": "store_true", "help": "print one round's figures as JSON"},
    )
    if options.here:
        print(json.dumps(measured()))
        return
    checkouts = {"this": Path(__file__).parents[1], **({"against": options.against} if options.against else {})}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(2 if options.quick else 5):
        for name, folder in checkouts.items():
            rounds[name].append(measured_in(folder))
    digests = {figure["digest"] for figures_ in rounds.values() for figure in figures_}
    if len(digests) > 1:
        sys.exit("the checkouts do not make the same bytes")
    rows = []
    for part in rounds["this"][0]["per_s"]:
        ours, *others = ([figure["per_s"][part] for figure in rounds[name]] for name in rounds)
        row = {"what": part, "per second and core": figures(ours, 0)}
        if others:
            row |= {"before": figures(others[0], 0), "times": round(median_ratio(ours, others[0]), 2)}
        rows.append(row)
    finish(options, "rendering", rows, [], {"views": VIEWS, "images": IMAGES}, ("pillow", "simplejpeg"))


def measured_in(folder: Path) -> dict[str, Any]:
    """One round with the code of a checkout, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--here"]
    environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measured() -> dict[str, Any]:
    """Things per second of processor time, by part, and the digest of all bytes and pixels made."""
    torch.set_num_threads(1)
    digest = hashlib.sha256()
    per_s: dict[str, float] = {}

    def timed(part: str, count: int, work: Callable[[], Any], passes: int = 1) -> Any:
        """The work's result. Its rate is that of the fastest pass."""
        for _ in range(passes):
            began = time.process_time()
            result = work()
            per_s[part] = max(per_s.get(part, 0), count / (time.process_time() - began))
        return result

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = photographs(scratch, IMAGES)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()][:IMAGES]
        pieces = [FileSlice(path, 0, path.stat().st_size) for path in files]
        chosen = settings("cpu", scratch, shard={"samples": IMAGES, "speed": {"workers": 0}})
        shards = packed(source, scratch, chosen)
        list(map(check_image, pieces))  # warm
        timed("originals checked", len(pieces), lambda: list(map(check_image, pieces)), passes=5)
        for pixels in ("stored", "replayed"):
            view = settings("cpu", scratch, view={"pixels": pixels}).view
            task = Task(shards.shards[0], 0, tuple(range(VIEWS)))
            renderer = Renderer(shards, [task], view, seed=0)
            block = timed(f"{pixels} views made, {VIEWS} an image", IMAGES * VIEWS, lambda made=renderer: made[0])
            jpegs = [block.kept] * VIEWS if pixels == "replayed" else block.jpegs
            stored = [(*item,) for rows in zip(jpegs, block.draws, strict=True) for item in zip(*rows, strict=True)]
            replayed = view if pixels == "replayed" else None

            batch = np.zeros((len(stored), 224, 224, 3), dtype=np.uint8)

            def load(stored: list[Any] = stored, replayed: Any = replayed, batch: np.ndarray = batch) -> None:
                for (jpeg, draw), row in zip(stored, batch, strict=True):
                    view_into(jpeg, draw, replayed, row)

            timed(f"{pixels} views loaded", len(stored), load, passes=5)
            for jpeg, _ in stored:
                digest.update(jpeg)
            for array in (batch, *(part.contiguous().numpy() for part in block.pixels)):
                digest.update(array.tobytes())
    return {"per_s": per_s, "digest": digest.hexdigest()}


if __name__ == "__main__":
    main()
