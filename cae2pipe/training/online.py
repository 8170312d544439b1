"""The teacher in the training step, as published: the baseline that cached targets are compared with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cae2pipe.loading.batches import Batch
from cae2pipe.loading.joining import prefix_of
from cae2pipe.runtime.device import exact_float32
from cae2pipe.teachers.protocol import Teacher


class OnlineLatents:
    """Latents of a batch's views from the teachers themselves, computed as in extraction, independent of the student's
    precision."""

    def __init__(self, *teachers: Teacher):
        self.teachers = teachers

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        latents = {}
        for number, teacher in enumerate(self.teachers):
            with exact_float32(teacher.device):
                output = teacher(batch.pixels)
            # Copies: tensors made in inference mode cannot take part in a backward pass.
            latents[f"{prefix_of(number)}raw"] = output.tokens.clone()
            if output.summary is not None:
                latents[f"{prefix_of(number)}raw_summary"] = output.summary.unsqueeze(1).clone()
        return latents
