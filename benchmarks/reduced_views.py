"""What do views of twice the student's size cost? Bytes of pixels, and milliseconds to load one.

Stored views of 448 pixels, decoded and reduced to 224, against those of 224; replayed views of images kept for 448
pixels, cropped at 224, against those kept for 224. The alternatives for stored views are bicubic and libjpeg's own
scaling, with the difference from crops rendered at 224.

    python -m benchmarks.reduced_views [--quick] [--out benchmarks/results/reduced_views-cpu.json]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import figures, finish, in_turns, parse_options, rate
from benchmarks.sample import photographs
from cae2pipe.config.extract import ViewSettings
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.jpeg import decode_view
from cae2pipe.images.kept import keep_image, view_pixels
from cae2pipe.images.views import ViewDraw, draw_view, encode_jpeg, render_view, resize

SMALL, LARGE = 224, 448


def main() -> None:
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = photographs(Path(folder), 48)
        paths = sorted(path for path in found.rglob("*") if path.is_file())[: 12 if options.quick else 48]
        images = [decode_rgb(path.read_bytes(), path) for path in paths]
    rows = stored_rows(images, 2 if options.quick else 5) + replayed_rows(images, 2 if options.quick else 5)
    finish(options, "reduced_views", rows, [], {"images": len(images)}, ("pillow", "simplejpeg"))


def stored_rows(images: Sequence[Image.Image], rounds: int) -> list[dict[str, Any]]:
    jpegs, crops = {}, {}
    for size in (SMALL, LARGE):
        settings = ViewSettings(size=size, pixels="stored")
        crops[size] = [render_view(image, draw_of(image, settings), settings) for image in images]
        jpegs[size] = [encode_jpeg(crop, settings) for crop in crops[size]]
    draw = np.zeros(11)

    def scaled(jpeg: bytes) -> np.ndarray:
        from simplejpeg import decode_jpeg

        return decode_jpeg(jpeg, "RGB", min_height=SMALL, min_width=SMALL, min_factor=1)

    ways: dict[str, tuple[int, Callable[[bytes], np.ndarray]]] = {
        f"stored at {SMALL}": (SMALL, lambda jpeg: view_pixels(jpeg, draw, None, size=SMALL)),
        f"stored at {LARGE}": (LARGE, lambda jpeg: view_pixels(jpeg, draw, None, size=LARGE)),
        f"stored at {LARGE}, reduced to {SMALL}": (
            LARGE,
            lambda jpeg: view_pixels(jpeg, draw, None, size=SMALL, view_size=LARGE),
        ),
        "the same, bicubic": (
            LARGE,
            lambda jpeg: np.asarray(resize(Image.fromarray(decode_view(jpeg, LARGE)), SMALL, SMALL)),
        ),
        "the same, scaled by libjpeg": (LARGE, scaled),
    }
    rows = timed({name: (way, jpegs[size]) for name, (size, way) in ways.items()}, rounds)
    for row, (size, way) in zip(rows, ways.values(), strict=True):
        row["kB"] = mean_kb(jpegs[size])
        if size == SMALL or way(jpegs[size][0]).shape[0] == SMALL:
            errors = [
                np.square(way(jpeg).astype(float) - np.asarray(crop)).mean()
                for jpeg, crop in zip(jpegs[size], crops[SMALL], strict=True)
            ]
            row["rms from the crop"] = round(float(np.sqrt(np.mean(errors))), 2)
    return rows


def replayed_rows(images: Sequence[Image.Image], rounds: int) -> list[dict[str, Any]]:
    work, sizes = {}, {}
    for kept, size in ((SMALL, SMALL), (LARGE, LARGE), (LARGE, SMALL)):
        settings = ViewSettings(size=kept)
        jpegs = [keep_image(image, settings) for image in images]
        pairs = [(jpeg, draw_of(Image.fromarray(decode_view(jpeg)), settings).to_row()) for jpeg in jpegs]
        name = f"replayed at {kept}" + (f", cropped at {size}" if size != kept else "")
        work[name] = (lambda pair, s=settings, z=size: view_pixels(*pair, s, size=z)), pairs
        sizes[name] = mean_kb(jpegs)
    rows = timed(work, rounds)
    return [{**row, "kB": sizes[row["what"]]} for row in rows]


def draw_of(image: Image.Image, settings: ViewSettings) -> ViewDraw:
    return draw_view(settings, 0, "a key", view=0, height=image.height, width=image.width)


def timed(work: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]], rounds: int) -> list[dict[str, Any]]:
    """A row for each way: milliseconds per item."""
    measures = {
        name: lambda way=way, items=items: 1000 / rate(lambda: [way(item) for item in items], len(items))
        for name, (way, items) in work.items()
    }
    return [{"what": name, "ms": figures(values, 2)} for name, values in in_turns(measures, rounds).items()]


def mean_kb(jpegs: Sequence[bytes]) -> float:
    return round(sum(map(len, jpegs)) / len(jpegs) / 1000, 1)


if __name__ == "__main__":
    main()
