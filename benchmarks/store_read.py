"""What do checksums and Zarr cost when reading?

Claims: reading 64-sample int8 blocks takes at most 1.05 times as long as plainly reading the same bytes of the same
files and computing their checksums. Blocks of klt are read and unpacked at least 1.4 times as fast as from the formats
before 4, whose symbols are whole 16-bit numbers. zarr-python is measured for comparison. All with a warm cache, in
processor time.

    python -m benchmarks.store_read [--quick] [--out benchmarks/results/store_read-cpu.json]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from benchmarks.feed_child import drawn_teacher
from benchmarks.harness import at_least, at_most, figures, finish, in_turns, median_ratio, parse_options, rate
from cae2pipe.targets.calibration import calibrate, make_codec
from cae2pipe.targets.chunks import BLOCK, ShardFile, decode_index, encode_chunk, index_size
from cae2pipe.targets.codecs import unit_tokens
from cae2pipe.targets.earlier_store import EarlierStore
from cae2pipe.targets.records import Records
from cae2pipe.targets.store import StoreReader
from cae2pipe.targets.store_layout import SYMBOLS, StoreLayout
from cae2pipe.targets.store_writing import StoreWriter, pack_block

TOKENS, DIM, BLOCKS = 197, 512, 48
"""CLIP's shape; the total exceeds the CPU cache."""
CODECS = ("int8", "fp16", "klt")
EARLIER = "earlier format"
FIT = 4
"""Blocks for calibration."""


def build(root: Path, codec: str, unit: torch.Tensor) -> tuple[dict, StoreLayout]:
    """A store in which every block holds the last 64 of the given unit tokens, and beside it one of an earlier
    format."""
    calibration, _ = calibrate(unit[:-BLOCK], codec, 0.999, level=1)
    layout = StoreLayout(TOKENS, DIM, TOKENS - 1, False, make_codec(codec, calibration))
    arrays = {**layout.codec.encode(unit[-BLOCK:]), "norms": np.ones((BLOCK, TOKENS), dtype="<f2")}
    write_earlier(root / f"earlier-{codec}.zarr", layout, arrays)
    chunks = pack_block(layout, arrays)
    writer = StoreWriter(root / f"{codec}.zarr", layout)
    for _ in range(BLOCKS):
        writer.append(chunks, BLOCK)
    count = BLOCK * BLOCKS
    keys = [f"k{i}" for i in range(count)]
    members = np.zeros((count, 3), dtype=np.int64)
    writer.finish(Records(keys, np.zeros(count, dtype=np.int32), np.zeros((count, 11)), members), {})
    return {"tar": "none", "zarr": f"{codec}.zarr", "samples": count}, layout


def write_earlier(path: Path, layout: StoreLayout, arrays: dict[str, np.ndarray]) -> None:
    """The arrays of ``BLOCKS`` equal blocks, each in one chunk, as ``EarlierStore`` reads them."""
    for name, spec in layout.blocked().items():
        array = arrays[name]
        grid = tuple(None if axis == spec.sample_axis else 1 for axis in range(array.ndim))
        file = ShardFile(path.joinpath(name, "c", *("0",) * array.ndim), grid)
        for _ in range(BLOCKS):
            file.append([encode_chunk(array, spec.level)])
        file.close()


def readers(root: Path, codec: str, tokens: torch.Tensor) -> dict[str, Callable[[], float]]:
    unit, layout = build(root, codec, tokens)
    earlier = EarlierStore(root, {**unit, "zarr": f"earlier-{codec}.zarr"}, layout)
    main = layout.codec.main
    stored = layout.stored(main)
    path = root / layout.path(unit["zarr"], main) / stored.data_path
    size = index_size(BLOCKS * stored.chunks)
    # Chunks by block, each block's next to one another.
    grid = (*(BLOCKS if side is None else side for side in stored.grid), 2)
    index = decode_index(path.read_bytes()[-size:], BLOCKS * stored.chunks, absent=True).reshape(grid)
    by_block = np.moveaxis(index, stored.sample_axis, 0).reshape(BLOCKS, -1, 2)
    spans = [(int(block[block[:, 1] > 0, 0].min()), int(block[:, 1].sum())) for block in by_block]
    order = np.random.default_rng(0).permutation(BLOCKS).tolist()
    reader = StoreReader(root, unit, layout)

    def plain() -> None:
        for block in order:
            offset, length = spans[block]
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                file.read(length)

    def checked() -> None:
        """Lower bound of the cost of checksums."""
        for block in order:
            offset, length = spans[block]
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                google_crc32c.value(file.read(length))

    def ours() -> None:
        for block in order:
            reader.loaded(block, layout.loaded_latents() if main == SYMBOLS else [main])

    def before() -> None:
        for block in order:
            earlier.arrays(block)

    def zarrs() -> None:
        import zarr

        array = zarr.open_group(root / unit["zarr"], mode="r")[f"{layout.group}/{main}"]
        axis = stored.sample_axis
        for block in order:
            array[(slice(None),) * axis + (slice(block * BLOCK, (block + 1) * BLOCK),)]

    megabytes = sum(length for _, length in spans) / 1e6
    works = {"plain": plain, "plain + CRC-32C": checked, "StoreReader": ours, "zarr": zarrs}
    if main == SYMBOLS:
        # MB/s of the bytes of today's format in both, so that rates compare times.
        works[EARLIER] = before
    return {
        f"{codec}/{name}": lambda work=work: rate(work, megabytes, time.process_time) for name, work in works.items()
    }


def clip_tokens() -> torch.Tensor:
    """Unit tokens with the shape and spectrum of CLIP's, (n, T, D)."""
    images = torch.randint(0, 256, ((FIT + 1) * BLOCK, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    unit, _ = unit_tokens(drawn_teacher(224, 14, DIM)(images.to(torch.uint8)).tokens)
    return unit


def main() -> None:
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    tokens = clip_tokens()
    with tempfile.TemporaryDirectory() as scratch:
        measures = {}
        for codec in CODECS:
            measures |= readers(Path(scratch), codec, tokens)
        speeds = in_turns(measures, 5 if options.quick else 21)
    rows = []
    for measure, mine in speeds.items():
        codec, name = measure.split("/")
        times = round(median_ratio(speeds[f"{codec}/plain"], mine), 2)
        rows.append({"codec": codec, "reader": name, "MB/s": figures(mine, 0), "times_plain": times})
    slower = median_ratio(speeds["int8/plain + CRC-32C"], speeds["int8/StoreReader"])
    faster = median_ratio(speeds["klt/StoreReader"], speeds[f"klt/{EARLIER}"])
    checks = [
        at_most("int8: StoreReader's time over that of plain reading and CRC-32C", slower, 1.05),
        at_least("klt: reading and unpacking over an earlier format's", faster, 1.4, 2),
    ]
    sizes = {"tokens": TOKENS, "dim": DIM, "blocks": BLOCKS}
    finish(options, "store_read", rows, checks, sizes, ("zarr", "numcodecs", "google-crc32c"))


if __name__ == "__main__":
    main()
