"""When a step does not fit into the device's memory: what would have."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cae2pipe.errors import OutOfMemoryError
from cae2pipe.loading.batches import Batch
from cae2pipe.training.step import Step


@contextmanager
def memory_advice(what: str, fix: str, where: object = None) -> Iterator[None]:
    """Around work on a device: the end of its memory becomes an error that says what to change.

    Raises:
        OutOfMemoryError: ``what`` (a noun and its number, as "a chunk of 64 images") did not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        raise OutOfMemoryError(f"{what} does not fit into the device's memory: {said}", where=where, fix=fix) from None


def explain_out_of_memory(step: Step, batch: Batch, recompute: bool) -> OutOfMemoryError:
    """The error to raise after torch's: it names what fits, found by trying.

    With several processes only a guess is made: trials would leave them out of step.
    """
    images = len(batch.visible)
    alone = step.world.ranks == 1
    fit = fitting(step, batch) if alone else next(finer(step, batch), None)
    again = "" if recompute else ", or --set speed.recompute=true"
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


def finer(step: Step, batch: Batch) -> Iterator[int]:
    """Numbers of parts, above the step's own, that this process's share of the batch can be cut into."""
    views = len(batch.weights)
    return (count for count in range(step.accumulation + 1, views + 1) if views % count == 0)


def fitting(step: Step, batch: Batch) -> int | None:
    """The smallest number of parts, of those tried, in which the batch's passes fit; None: not even view by view."""
    for parts in finer(step, batch):
        release(step)
        try:
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
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
