"""When a step does not fit into the device's memory: what would have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cae2pipe.errors import OutOfMemoryError
from cae2pipe.loading.batches import Batch
from cae2pipe.runtime.device_memory import free_unused
from cae2pipe.training.optimizer import make_moments
from cae2pipe.training.step import Step


def upload_advice(views: int, parts: int, recompute: bool) -> str:
    """What leaves more room for the next batch beside a step on ``views`` in ``parts``."""
    more = next(finer(views, parts), None)
    ways = [f"--set speed.accumulation={more}"] if more else []
    ways += [] if recompute else ["--set speed.recompute=true"]
    return " or ".join(ways or ["lower data.batch (a new run), or use a smaller model"])


def explain_out_of_memory(step: Step, batch: Batch, recompute: bool) -> OutOfMemoryError:
    """The error to raise after torch's: it names what fits, found by trying.

    With several processes only a guess is made: trials would leave them out of step.
    """
    images = len(batch.visible)
    alone = step.world.ranks == 1
    again = "" if recompute else ", or --set speed.recompute=true"
    try:
        fit = fitting(step, batch) if alone else next(finer(len(batch.weights), step.accumulation), None)
    except torch.OutOfMemoryError:
        return OutOfMemoryError(
            f"weights, gradients and the optimizer's moments alone do not fit into the memory of {step.world.device}",
            where=f"step {batch.step}",
            fix="use a smaller model or a device with more memory, or shard the model: torchrun with --set "
            "speed.parallel=fsdp",
        )
    if fit:
        what = f"{images // fit} images a pass {'would' if alone else 'may'} fit"
        fix = f"--set speed.accumulation={fit}{again}"
    else:
        what = "not even one image a pass would fit"
        fix = "use a smaller model" if recompute else "--set speed.recompute=true, or use a smaller model"
    return OutOfMemoryError(
        f"{images // step.accumulation} images a pass do not fit into the memory of {step.world.device}; {what}",
        where=f"step {batch.step}, speed.accumulation {step.accumulation}",
        fix=fix,
    )


def finer(views: int, parts: int) -> Iterator[int]:
    """Numbers of parts that a process's ``views`` of a batch can be cut into, each at least twice the one before, from
    twice ``parts``."""
    least = 2 * parts
    while least <= views:
        count = next(count for count in range(least, views + 1) if views % count == 0)
        yield count
        least = 2 * count


def fitting(step: Step, batch: Batch) -> int | None:
    """The first number of parts, of those tried, in which the batch's passes fit; None: not even the finest.

    The optimizer's moments, which come to be in the first update, are made before: what is advised has to hold them
    too. Nothing is compiled for a trial, which would take minutes; run eagerly it needs at least as much memory.

    Raises:
        torch.OutOfMemoryError: the moments do not fit.
    """
    release(step)
    make_moments(step.optimizer)
    for parts in finer(len(batch.weights), step.accumulation):
        release(step)
        try:
            with torch.compiler.set_stance("force_eager"):
                step.backward(batch, parts)
        except torch.OutOfMemoryError:
            continue
        finally:
            release(step)
        return parts
    return None


def release(step: Step) -> None:
    """Give back what a failed pass still holds."""
    step.optimizer.zero_grad(set_to_none=True)
    free_unused()
