"""How many bytes does a codec need for a fidelity, and how fast is it?

Claims: klt at a mean cosine of 0.999 takes at most 0.60 of int8's bytes on a ViT-Ti's tokens with a 1st percentile of
at least 0.998, and decompression by Blosc reaches 5,000 views/s per core at 192 dimensions. The tokens on which
fidelity is measured were not used for calibration.

    python -m benchmarks.codec_pareto [--quick] [--device cpu] [--out benchmarks/results/codec_pareto-cpu.json]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import at_least, at_most, figures, finish, in_turns, parse_options, rate
from benchmarks.sample import crops, packed, rendered, settings, teacher_of, tokens_of
from cae2pipe.targets.calibration import calibrate, make_codec, summarise, token_cosines
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.store import unpack_array
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.store_writing import Chunks, pack_block, packed_bytes

CODECS = (
    ("fp16", 0.999),
    ("int8", 0.999),
    ("klt", 0.9999),
    ("klt", 0.9995),
    ("klt", 0.999),
    ("klt", 0.998),
    ("klt", 0.99),
    ("klt", 0.97),
    ("klt", 0.9),
)
FIT, TEST = 8, 4
"""Numbers of blocks for calibration and for measurement."""


def unpack_latents(layout: StoreLayout, chunks: Chunks) -> dict[str, np.ndarray]:
    """The codec's arrays of a block as loaders read them."""
    unpacked: dict[str, np.ndarray] = {}
    for name in layout.codec.arrays():
        unpacked |= unpack_array(layout, name, chunks[f"{layout.group}/{name}"], BLOCK)
    return unpacked


def main() -> None:
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = settings(options.device, Path(scratch))
        shards = packed(crops(Path(scratch)), Path(scratch), chosen)
        unit, norms = unit_tokens(tokens_of(teacher_of(chosen), rendered(shards, chosen, FIT + TEST)))
    fit, test, norms = unit[: -TEST * BLOCK], unit[-TEST * BLOCK :], norms[-TEST * BLOCK :]
    rows, by_label, measures = [], {}, {}
    for name, fidelity in CODECS:
        label = f"{name} {fidelity}" if name == "klt" else name
        calibration, _ = calibrate(fit, name, fidelity, level=1)
        codec = make_codec(name, calibration, 1)
        layout = StoreLayout(test.shape[1], test.shape[2], test.shape[1] - 1, False, codec)
        blocks = test.split(BLOCK)
        arrays = [
            {**codec.encode(block), "norms": some.numpy().astype("<f2")}
            for block, some in zip(blocks, norms.split(BLOCK), strict=True)
        ]
        chunks = [pack_block(layout, block) for block in arrays]
        cosines = [
            token_cosines(block, codec.decode(as_tensors(stored)), calibration.mean)
            for block, stored in zip(blocks, arrays, strict=True)
        ]
        reached = summarise(torch.cat([raw for raw, _ in cosines]), torch.cat([centred for _, centred in cosines]))
        by_label[label] = {
            "codec": label,
            "bytes": round(sum(map(packed_bytes, chunks)) / len(test)),
            "mean": reached.mean,
            "p1": reached.p1,
            "centred_mean": reached.centred_mean,
        }

        def encode(codec=codec, layout=layout, blocks=blocks, arrays=arrays) -> float:
            def work() -> None:
                for block, stored in zip(blocks, arrays, strict=True):
                    pack_block(layout, {**codec.encode(block), "norms": stored["norms"]})

            return rate(work, len(test))

        def unpack(layout=layout, chunks=chunks) -> float:
            return rate(lambda: [unpack_latents(layout, block) for block in chunks], len(test))

        def decode(codec=codec, layout=layout, chunks=chunks) -> float:
            def work() -> None:
                for block in chunks:
                    codec.decode(as_tensors(unpack_latents(layout, block)))

            return rate(work, len(test))

        measures |= {f"{label}/encode": encode, f"{label}/unpack": unpack, f"{label}/decode": decode}
    speeds = in_turns(measures, 3 if options.quick else 9)
    for label, row in by_label.items():
        row["of_int8"] = round(row["bytes"] / by_label["int8"]["bytes"], 3)
        rows.append(row | {what: figures(speeds[f"{label}/{what}"], 0) for what in ("encode", "unpack", "decode")})
    klt = by_label["klt 0.999"]
    checks = [
        at_most("klt at 0.999: of int8's bytes", klt["bytes"] / by_label["int8"]["bytes"], 0.60),
        at_least("klt at 0.999: mean cosine", klt["mean"], 0.999, 5),
        at_least("klt at 0.999: 1st percentile", klt["p1"], 0.998, 5),
        at_least("klt at 0.999: unpacking, views/s a core", statistics.median(speeds["klt 0.999/unpack"]), 5000, 0),
    ]
    sizes = {"fitted_images": len(fit), "measured_images": len(test), "dim": unit.shape[2], "tokens": unit.shape[1]}
    finish(options, "codec_pareto", rows, checks, sizes, ("torch", "numcodecs"))


if __name__ == "__main__":
    main()
