"""When a step does not fit into the device's memory: what would have."""

from __future__ import annotations

import gc

import torch

from cae2pipe.errors import OutOfMemoryError
from cae2pipe.loading.batches import Batch
from cae2pipe.training.step import Step


def explain_out_of_memory(step: Step, batch: Batch, recompute: bool) -> OutOfMemoryError:
    """The error to raise after torch's: it names what fits, found by trying.

    With several processes only a guess is made: trials would leave them out of step.
    """
    images = len(batch.visible)
    fit = None if step.world.ranks > 1 else fitting(step, batch)
    again = "" if recompute else ", or --set speed.recompute=true"
    if fit:
        what = f"{images // fit} images a pass would fit"
        fix = f"--set speed.accumulation={fit}{again}"
    elif step.world.ranks > 1:
        what = "fewer images a pass may fit"
        fix = f"--set speed.accumulation={2 * step.accumulation}{again}"
    else:
        what = "not even one image a pass would fit"
        fix = "use a smaller model" if recompute else "--set speed.recompute=true, or use a smaller model"
    return OutOfMemoryError(
        f"{images // step.accumulation} images a pass do not fit into the memory of {step.world.device}; {what}",
        where=f"step {batch.step}, speed.accumulation {step.accumulation}",
        fix=fix,
    )


def fitting(step: Step, batch: Batch) -> int | None:
    """The smallest number of parts, of those tried, in which the batch's passes fit; None: not even view by view."""
    views = len(batch.weights)
    for parts in (count for count in range(step.accumulation + 1, views + 1) if views % count == 0):
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
