"""The sample of images that a codec is calibrated on."""

from __future__ import annotations

from contextlib import closing

from cae2pipe.config.extract import ExtractSettings
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.encoding import lane_count, run_teacher
from cae2pipe.targets.rendering import Task, render_blocks
from cae2pipe.targets.stored_source import Source, renderer_of
from cae2pipe.teachers.check import check_output
from cae2pipe.teachers.protocol import Teacher, TeacherOutput


def run_sample(
    shards: Source, teacher: Teacher, settings: ExtractSettings, *, images: int, workers: int, report: Report
) -> tuple[list[TeacherOutput], list[bytes]]:
    """The teacher's outputs on view 0 of the first ``images`` images, up to a whole block, on the CPU, block by block;
    and the JPEGs that the set keeps of them: of the views, or of the images that views are replayed from."""
    tasks, taken = [], 0
    for shard in shards.shards:
        for number in range(-(-shard.samples // BLOCK)):
            if taken < images:
                tasks.append(Task(shard, number, (0,)))
                taken += min(BLOCK, shard.samples - number * BLOCK)
    outputs, jpegs = [], []
    report.total(taken, "images")
    lanes = lane_count(settings.speed.lanes, teacher.device)
    with closing(render_blocks(renderer_of(shards, tasks, settings), workers)) as rendered:
        for block, output in run_teacher(rendered, teacher, lanes):
            where = f"shard {block.task.shard.name}, block {block.task.block}"
            check_output(output, teacher.info, block.keys, where, constant=True)
            outputs.append(output)
            jpegs += block.kept or block.jpegs[0]
            report.advance(len(block.keys))
    return outputs, jpegs
