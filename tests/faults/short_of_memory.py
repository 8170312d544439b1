"""Reads all kinds of files with too little memory, and prints the outcomes. Runs in a separate process, since one that
has run out of memory is unreliable afterwards."""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SPARE = 16 * 2**20
"""Bytes that can still be allocated, up to a PIECE more: enough for Python, too few for the files read here."""

LARGE = 2 * SPARE
PIECE = SPARE // 4


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    old = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, old)


@contextmanager
def little_memory() -> Iterator[None]:
    """Within it ``SPARE`` bytes can be allocated, regardless of memory that was freed before."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + SPARE):
        taken = []
        with suppress(MemoryError):
            while True:
                taken.append(np.empty(PIECE, dtype=np.uint8))
        del taken[-SPARE // PIECE :]
        yield


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def an_image(kind: str, side: int, **options) -> Callable[[Path], Callable[[], object]]:
    def prepare(folder: Path) -> Callable[[], object]:
        from cae2pipe.images.decode import decode_rgb

        gradient = Image.linear_gradient("L").resize((side, side)).convert("RGB")
        data = saved(gradient, kind, **options)
        return lambda: decode_rgb(data, where="x")

    return prepare


def a_view(folder: Path) -> Callable[[], object]:
    from cae2pipe.images.jpeg import decode_view

    data = saved(Image.new("RGB", (5000, 5000)), "JPEG")
    return lambda: decode_view(data)


def a_label_map(folder: Path) -> Callable[[], object]:
    from cae2pipe.dense.label_maps import read_labels

    Image.new("L", (5000, 5000)).save(folder / "labels.png")
    return lambda: read_labels(folder / "labels.png")


def weights(suffix: str) -> Callable[[Path], Callable[[], object]]:
    def prepare(folder: Path) -> Callable[[], object]:
        from safetensors.torch import save_file

        from cae2pipe.teachers.weights import read_weights

        path = folder / f"weights{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)({"a": torch.zeros(LARGE, dtype=torch.uint8)}, path)
        return lambda: read_weights(path)

    return prepare


def a_checkpoint(folder: Path) -> Callable[[], object]:
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.training.checkpoint import load_checkpoint, save_checkpoint

    save_checkpoint(folder, 1, {"a": torch.zeros(8)}, run="run", keep=2)
    save_checkpoint(folder, 2, {"a": torch.zeros(LARGE, dtype=torch.uint8)}, run="run", keep=2)
    return lambda: load_checkpoint(folder, Silent(), run="run", like={})


def another_ranks_checkpoint(folder: Path) -> Callable[[], object]:
    from cae2pipe.training.checkpoint import read_checkpoint

    torch.save({"a": torch.zeros(LARGE, dtype=torch.uint8)}, folder / "step-00000002.pt")
    return lambda: read_checkpoint(folder, 2)


def a_failure(folder: Path) -> Callable[[], object]:
    from cae2pipe.training.failure import load_failure

    torch.save({"batch": torch.zeros(LARGE, dtype=torch.uint8)}, folder / "step.pt")
    return lambda: load_failure(folder / "step.pt")


def an_exported_model(folder: Path) -> Callable[[], object]:
    import timm  # noqa: F401

    from cae2pipe.evaluation.encoders import build_exported
    from cae2pipe.models.encoder import Encoder
    from cae2pipe.models.export import timm_config

    config = timm_config(Encoder(width=3072, depth=1, heads=8, image_size=32, patch_size=16))
    (folder / "config.json").write_text(json.dumps(config))
    return lambda: build_exported(folder / "config.json", 2**40)


READERS = {
    "an image": an_image("PNG", 3000),
    # Pillow's messages are "broken data stream" and "could not create decoder object".
    "a progressive JPEG": an_image("JPEG", 3000, progressive=True),
    "a WebP": an_image("WEBP", 3000, quality=5),
    "a view": a_view,
    "a label map": a_label_map,
    "weights of torch": weights(".pt"),
    "safetensors": weights(".safetensors"),
    "a checkpoint": a_checkpoint,
    "another rank's checkpoint": another_ranks_checkpoint,
    "the record of a failed step": a_failure,
    "an exported model": an_exported_model,
}


def main(folder: Path) -> None:
    """Print the outcome of each as JSON, and whether it could be read with enough memory."""
    reads = {}
    for number, (name, prepare) in enumerate(READERS.items()):
        own = folder / str(number)
        own.mkdir()
        reads[name] = prepare(own)
    # The collector then ignores imported objects.
    gc.collect()
    gc.freeze()
    outcomes = {}
    for name, read in reads.items():
        try:
            with little_memory():
                read()
            outcomes[name] = "nothing"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        with suppress(Exception):
            read()
            outcomes[name] += ", then read"
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
