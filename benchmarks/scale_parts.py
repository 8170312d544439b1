"""The parts of ``benchmarks/scale.py``, each run in a process of its own, so that its memory can be measured.

    python -m benchmarks.scale_parts PART JSON

prints ``{"s": CPU seconds, "mb": peak memory above that after imports, ...}`` as its last line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.artifact import ShardsArtifact, TargetsArtifact
from cae2pipe.artifacts.manifest_kinds import TargetsUnit
from cae2pipe.config.base import load
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.order import BlockList, rank_streams, shuffled, stream_pieces, worker_streams
from cae2pipe.loading.plan import Plan
from cae2pipe.loading.planning import make_plan
from cae2pipe.shards.entries import Entry, Source
from cae2pipe.shards.listing import with_listings
from cae2pipe.targets.paths import images_index_path, images_name, images_tar_path, store_name, store_path
from cae2pipe.targets.target_set import TargetSet

SHARD = "000000"
"""The shard of the real set, which the others are made of."""
STREAMS, WORKERS, WINDOW = 64, 16, 4
PLAN = "plan.pickle"


def peak_mb() -> float:
    """Largest resident memory of this process so far. ``ru_maxrss`` would include the parent's from before exec."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measured(work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """CPU seconds and memory of a call, with what it returns."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = peak_mb(), time.process_time()
    more = work() or {}
    spent = time.process_time() - began
    return {"s": spent, "mb": peak_mb() - before, **more}


def make(real: str, root: str, shards: int, views: int) -> dict[str, Any]:
    """A set of ``shards`` copies of the real shard, in ``views`` copies of its view, under other names and digests.
    Files are links to the real ones. Measures writing the manifest."""
    artifact, source = TargetsArtifact.open(linked(Path(real), Path(root))), Path(real)
    for folder in ("images", *(f"latents/v{view:02d}" for view in range(views))):
        (artifact.root / folder).mkdir(parents=True)
    for name, unit in made_units(artifact, shards, views):
        artifact.units[name] = unit
        view, shard = unit.get("view"), name.rpartition("/")[2]
        if view is None:
            for path in (images_tar_path, images_index_path):
                (artifact.root / path(shard)).hardlink_to(source / path(SHARD))
        else:
            (artifact.root / store_path(int(view), shard)).symlink_to(source / store_path(0, SHARD))
    before = time.process_time()
    artifact.save(complete=True)
    manifest = artifact.root / "manifest.json"
    return {"s": time.process_time() - before, "units": len(artifact.units), "bytes": manifest.stat().st_size}


def linked(real: Path, root: Path) -> Path:
    """A folder with the real set's manifest and calibration."""
    root.mkdir(parents=True)
    (root / "manifest.json").write_bytes((real / "manifest.json").read_bytes())
    (root / "codec.zarr").symlink_to(real / "codec.zarr")
    return root


def made_units(artifact: TargetsArtifact, shards: int, views: int) -> Iterator[tuple[str, TargetsUnit]]:
    """Units as the real one of each kind, with other names and digests."""
    image, store = (json.dumps(artifact.units[name]) for name in (images_name(SHARD), store_name(0, SHARD)))
    for number in range(shards):
        shard = f"{number:06d}"
        yield images_name(shard), renamed(image, shard, 0)
        for view in range(views):
            yield store_name(view, shard), renamed(store, shard, view)


def renamed(text: str, shard: str, view: int) -> TargetsUnit:
    unit: Any = json.loads(text.replace(SHARD, shard).replace("v00/", f"v{view:02d}/"))
    if "view" in unit:
        unit["view"] = view
    for path, entry in unit["files"].items():
        entry["sha256"] = hashlib.sha256(path.encode()).hexdigest()
    return unit


def read(root: str) -> dict[str, Any]:
    """Reading the manifest."""
    return {"units": len(TargetsArtifact.open(Path(root)).units)}


def merge(real: str, root: str, entries: int) -> dict[str, Any]:
    """Adding units to the journal, and merging it, as a run that is resumed does."""
    out = linked(Path(real), Path(root))
    artifact = TargetsArtifact.open(out)
    began = time.process_time()
    for name, unit in itertools.islice(made_units(artifact, entries, 1), entries):
        artifact.add(name, unit)
    added = time.process_time()
    TargetsArtifact.open(out).save()
    return {"s": time.process_time() - added, "add_s": added - began}


def main_process(root: str) -> dict[str, Any]:
    """Opening the set and making the plan."""
    settings = load(PretrainSettings, "pretrain", "tiny", values={"data": {"batch": 2048, "streams": STREAMS}})
    targets = TargetSet(root)
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=0)
    done = time.process_time()
    data = pickle.dumps(plan)
    pickled = time.process_time() - done
    Path(root, PLAN).write_bytes(data)
    return {"samples": plan.samples, "plan_mb": len(data) / 1e6, "pickle_s": pickled}


def worker(root: str) -> dict[str, Any]:
    """A worker's plan, and the first samples of its streams."""
    plan: Plan = pickle.loads(Path(root, PLAN).read_bytes())
    assert len(plan.units) > 0
    assert first_samples(plan.blocks) > 0
    return {}


def first_samples(blocks: BlockList) -> int:
    """How many samples of the streams of one of 16 workers are ordered first."""
    own = worker_streams(rank_streams(STREAMS, 1, 0), WORKERS, 0)
    pieces = {stream: stream_pieces(blocks, 0, 0, streams=STREAMS, wanted=[stream])[stream] for stream in own}
    first = [next(shuffled(pieces[stream].sizes(), WINDOW, 0, epoch=0, stream=stream)) for stream in own]
    return sum(len(numbers) for numbers, _ in first)


def order(shards: int, samples: int, views: int) -> dict[str, Any]:
    """What a worker does at the start of an epoch, for a list of blocks that came from no manifest."""
    names = [f"{number:06d}" for number in range(shards)]
    blocks = BlockList(dict.fromkeys(names, samples), dict.fromkeys(names, tuple(range(views))))
    assert first_samples(blocks) > 0
    return {"blocks": len(blocks), "list_mb": len(pickle.dumps(blocks)) / 1e6}


def listing(root: str, images: int) -> dict[str, Any]:
    """Stage 1: listing a source, and comparing it with its listing when a run is resumed."""
    names = (f"n{number % 1000:08d}/n{number % 1000:08d}_{number}" for number in range(images))
    entries = [Entry(f"{name}.JPEG", name, number % 1000, 110_000) for number, name in enumerate(names)]
    source = Source(Path("/made-up"), [str(number) for number in range(1000)], entries)
    artifact = ShardsArtifact.open_or_create(
        Path(root), {"settings": {}, "classes": source.classes}, facts={"rejected": 0}, fix=""
    )
    with_listings(source, artifact)
    written = time.process_time()
    with_listings(source, ShardsArtifact.open(Path(root)))
    size = (Path(root) / "listing-000.jsonl.gz").stat().st_size
    return {"again_s": time.process_time() - written, "bytes": size}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make,
    "read": read,
    "merge": merge,
    "main": main_process,
    "worker": worker,
    "order": order,
    "listing": listing,
}

if __name__ == "__main__":
    part, arguments = PARTS[sys.argv[1]], json.loads(sys.argv[2])
    print(json.dumps(measured(lambda: part(**arguments))))
