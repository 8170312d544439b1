"""Advice when a step does not fit into the device's memory: what would fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cae2pipe.errors import OutOfMemoryError
from cae2pipe.loading.batches import Batch
from cae2pipe.runtime.device_memory import free_unused
from cae2pipe.training.optimizer import make_moments
from cae2pipe.training.step import Step


def upload_advice(views: int, parts: int, recompute: bool) -> str:
    """Settings that leave more room for the next batch while a step runs on ``views`` in ``parts``."""
    more = next(finer(views, parts), None)
    ways = [f"--set speed.accumulation={more}"] if more else []
    ways += [] if recompute else ["--set speed.recompute=true"]
    return " or ".join(ways or ["lower data.batch (a new run), or use a smaller model"])


def explain_out_of_memory(step: Step, batch: Batch, recompute: bool) -> OutOfMemoryError:
    """The error that replaces torch's: it names what fits, found by trial.

    With several processes it only guesses, since trials would leave them out of step.
    """
    images = len(batch.visible)
    alone = step.world.ranks == 1
    again = "" if recompute else ", or --set speed.recompute=true"
    try:
        fit = fitting(step, batch) if alone else next(finer(len(batch.weights), step.accumulation), None)
    except torch.OutOfMemoryError:
        return OutOfMemoryError(
            f"weights, gradients and optimizer moments alone do not fit into the memory of {step.world.device}",
            where=f"step {batch.step}",
            fix="use a smaller model or a device with more memory, or shard the model: torchrun with --set "
            "speed.parallel=fsdp",
        )
    if fit:
        what = f"{images // fit} images per pass {'would' if alone else 'may'} fit"
        fix = f"--set speed.accumulation={fit}{again}"
    else:
        what = "not even one image per pass would fit"
        fix = "use a smaller model" if recompute else "--set speed.recompute=true, or use a smaller model"
    return OutOfMemoryError(
        f"{images // step.accumulation} images per pass do not fit into the memory of {step.world.device}; {what}",
        where=f"step {batch.step}, speed.accumulation {step.accumulation}",
        fix=fix,
    )


def finer(views: int, parts: int) -> Iterator[int]:
    """Numbers of parts that a process's ``views`` of a batch can be divided into. The first is at least twice
    ``parts``, each further one at least twice the one before."""
    least = 2 * parts
    while least <= views:
        count = next(count for count in range(least, views + 1) if views % count == 0)
        yield count
        least = 2 * count


def fitting(step: Step, batch: Batch) -> int | None:
    """The first number of parts, of those tried, with which the batch fits; None: not even with the largest.

    The optimizer's moments, which the first update creates, are made before the trials, since the advice must leave
    room for them. Trials run eagerly: compiling takes minutes, and eager mode needs at least as much memory.

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
    """Free the memory that a failed pass still holds."""
    step.optimizer.zero_grad(set_to_none=True)
    free_unused()
