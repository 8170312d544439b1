"""Makes the missing views of a set: rendering, teacher, encoding and writing run concurrently."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.encoding import Meter, encode_ahead, lane_count
from cae2pipe.targets.groups import read_groups
from cae2pipe.targets.images import kept_images
from cae2pipe.targets.missing import MissingUnits
from cae2pipe.targets.rendering import Renderer, block_tasks, render_blocks
from cae2pipe.targets.stored_source import Source, StoredSource, renderer_of
from cae2pipe.targets.view_writing import ShardWriter
from cae2pipe.teachers.protocol import Teacher


def make_views(
    artifact: TargetsArtifact,
    shards: Source,
    missing: list[MissingUnits],
    *,
    teacher: Teacher,
    settings: ExtractSettings,
    workers: int,
    report: Report,
) -> Meter:
    """Render, encode and write all missing views; workers, device, packing and writing run concurrently.

    Args:
        shards: the originals, or a set that has the views. The images that replayed views are cut from must be in
            ``artifact`` already.
        missing: what to make; its ``images`` are ignored.

    Raises:
        DamageError: an image cannot be read. TeacherError, OutOfMemoryError: as ``encode_ahead``.
    """
    groups = read_groups(artifact)
    # Replayed views are cut from the images that the set keeps, not from the originals.
    root = shards.pixels if isinstance(shards, StoredSource) and artifact.by_reference else artifact.root
    kept = kept_images(artifact, root) if settings.view.pixels == "replayed" else None
    stored = shards if isinstance(shards, StoredSource) and kept is None else None
    by_name = {shard.name: shard for shard in (kept or shards).shards}
    tasks = [
        task for lacking in missing if lacking.views for task in block_tasks(by_name[lacking.shard.name], lacking.views)
    ]
    report.phase("storing views and latents")
    report.total(sum(lacking.shard.samples * len(lacking.views) for lacking in missing), "views")
    renderer = (
        Renderer(kept, tasks, settings.view, seed=settings.seed, kept=True)
        if kept
        else renderer_of(shards, tasks, settings)
    )
    rendered = render_blocks(renderer, workers)
    meter, lanes = Meter(), lane_count(settings.speed.lanes, teacher.device)
    encoded = encode_ahead(rendered, teacher, groups, meter=meter, lanes=lanes)
    layouts = [group.layout for group in groups.values()]
    writers: deque[ShardWriter] = deque()
    finishing: deque[Future[None]] = deque()
    # Workers are always terminated here: one that is stuck would keep this process from exiting.
    with closing(rendered), ThreadPoolExecutor(1) as finisher:
        try:
            # Blocks come in task order, so the blocks of one shard are consecutive.
            for shard, blocks in groupby(encoded, key=lambda block: block.rendered.task.shard):
                writer = ShardWriter(shard)
                writers.append(writer)
                writer.append(blocks, artifact.root, layouts, meter=meter, report=report)
                finishing.append(finisher.submit(writer.finish, artifact, kept or stored, report))
                while finishing and (len(finishing) > 1 or finishing[0].done()):
                    finishing.popleft().result()
                    writers.popleft()
            for future in finishing:
                future.result()
                writers.popleft()
        finally:
            finisher.shutdown(wait=True, cancel_futures=True)
            for writer in writers:
                writer.discard()
    meter.ended = time.perf_counter()
    report.log(
        f"{counted(meter.views, 'view')}, {meter.rate():.0f} per second; {meter.bottleneck()} "
        f"(idle {meter.idle_fraction():.0%})"
    )
    return meter
