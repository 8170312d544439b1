"""What do checksums and Zarr cost when reading?

Claim: reading 64-sample int8 blocks takes at most 1.05 times as long as plainly reading the same bytes of the same
files and computing their checksums. zarr-python is measured for comparison. All with a warm cache.

    python -m benchmarks.store_read [--quick] [--out benchmarks/results/store_read-cpu.json]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from benchmarks.harness import at_most, figures, finish, in_turns, median_ratio, parse_options, rate
from cae2pipe.targets.calibration import calibrate, make_codec
from cae2pipe.targets.chunks import BLOCK, decode_index, index_size
from cae2pipe.targets.records import Records
from cae2pipe.targets.store import StoreReader
from cae2pipe.targets.store_layout import SYMBOLS, StoreLayout
from cae2pipe.targets.store_writing import StoreWriter, pack_block

TOKENS, DIM, BLOCKS = 197, 512, 48
"""CLIP's shape; the total exceeds the CPU cache."""


def build(root: Path, codec: str) -> tuple[dict, StoreLayout]:
    """A store of random tokens: the speed does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(BLOCK, TOKENS, DIM, generator=generator), dim=-1)
    calibration, _ = calibrate(unit, codec, 0.999, level=1)
    layout = StoreLayout(TOKENS, DIM, TOKENS - 1, False, make_codec(codec, calibration))
    chunks = pack_block(layout, {**layout.codec.encode(unit), "norms": np.ones((BLOCK, TOKENS), dtype="<f2")})
    writer = StoreWriter(root / f"{codec}.zarr", layout)
    for _ in range(BLOCKS):
        writer.append(chunks, BLOCK)
    count = BLOCK * BLOCKS
    keys = [f"k{i}" for i in range(count)]
    members = np.zeros((count, 3), dtype=np.int64)
    writer.finish(Records(keys, np.zeros(count, dtype=np.int32), np.zeros((count, 11)), members), {})
    return {"tar": "none", "zarr": f"{codec}.zarr", "samples": count}, layout


def readers(root: Path, codec: str) -> dict[str, Callable[[], float]]:
    unit, layout = build(root, codec)
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

    def zarrs() -> None:
        import zarr

        array = zarr.open_group(root / unit["zarr"], mode="r")[f"{layout.group}/{main}"]
        axis = stored.sample_axis
        for block in order:
            array[(slice(None),) * axis + (slice(block * BLOCK, (block + 1) * BLOCK),)]

    megabytes = sum(length for _, length in spans) / 1e6
    return {
        f"{codec}/{name}": lambda work=work: rate(work, megabytes)
        for name, work in {"plain": plain, "plain + CRC-32C": checked, "StoreReader": ours, "zarr": zarrs}.items()
    }


def main() -> None:
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measures = {}
        for codec in ("int8", "fp16", "klt"):
            measures |= readers(Path(scratch), codec)
        speeds = in_turns(measures, 5 if options.quick else 21)
    rows = []
    for codec in ("int8", "fp16", "klt"):
        plain = speeds[f"{codec}/plain"]
        for name in ("plain", "plain + CRC-32C", "StoreReader", "zarr"):
            mine = speeds[f"{codec}/{name}"]
            times = round(median_ratio(plain, mine), 2)
            rows.append({"codec": codec, "reader": name, "MB/s": figures(mine, 0), "times_plain": times})
    slower = median_ratio(speeds["int8/plain + CRC-32C"], speeds["int8/StoreReader"])
    checks = [at_most("int8: StoreReader's time over that of plain reading and CRC-32C", slower, 1.05)]
    sizes = {"tokens": TOKENS, "dim": DIM, "blocks": BLOCKS}
    finish(options, "store_read", rows, checks, sizes, ("zarr", "numcodecs", "google-crc32c"))


if __name__ == "__main__":
    main()
