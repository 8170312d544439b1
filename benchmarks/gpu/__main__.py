"""Is cae2pipe correct on this device, and how fast is it?

Checks the training step, extraction, evaluations and the behaviour when memory runs out, against the CPU and against
the documented guarantees, and measures speeds. It needs no network and no data: it uses noise and random weights. FILE
is rewritten after every part. The exit status is 0 if every part that ran is ok.

    python -m benchmarks.gpu --out FILE [--parts A,B1,...] [--budget 900] [--sizes tiny,small,base,large]
    python -m benchmarks.gpu --device cpu --quick      # the same code with tiny models, to test the suite itself
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

BEGAN = time.perf_counter()
LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "cae2pipe")


def main() -> int:
    from benchmarks.gpu.listing import PARTS, SIZES, select

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results, rewritten after every part")
    parser.add_argument(
        "--parts", help=f"run only these, of {', '.join(part.name for part in PARTS)}; B means B1, B2, ..."
    )
    parser.add_argument("--budget", type=float, default=900, help="seconds in total; parts that do not fit are skipped")
    parser.add_argument("--sizes", default=",".join(SIZES), help="sizes of students to measure")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--quick", action="store_true", help="tiny models, to test the suite itself")
    options = parser.parse_args()
    sizes = tuple(options.sizes.split(","))
    try:
        chosen = select(options.parts, sizes)
    except ValueError as error:
        parser.error(str(error))
    from benchmarks.gpu.child import prepare
    from benchmarks.gpu.runner import print_record, run_suite
    from benchmarks.gpu.state import State
    from benchmarks.harness import device_name, real_folder
    from cae2pipe.errors import Cae2pipeError
    from cae2pipe.runtime.device import pick_device

    try:
        device = pick_device(options.device)
    except Cae2pipeError as error:
        parser.error(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = real_folder()
    head = {
        "benchmark": "gpu",
        "device": device_name(str(device)),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]},
        "quick": options.quick,
        "sizes": list(sizes),
        "stand_ins": {
            "photographs": "those of CAE2PIPE_REAL" if real else "noise",
            "teachers": "random weights",
            "labelled images": "noise",
        },
    }
    with tempfile.TemporaryDirectory(prefix="cae2pipe-gpu-") as scratch:
        # Parts in different processes share inductor's cache.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(scratch) / "inductor"))
        state = State(str(device), options.quick, Path(scratch), sizes)
        prepare(state)
        record = run_suite(chosen, state, options.budget, options.out, head, BEGAN)
    print_record(record)
    return int(record.failed())


if __name__ == "__main__":
    sys.exit(main())
