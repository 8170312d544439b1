"""The teacher in the training step, as published: the baseline that cached targets are compared with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cae2pipe.loading.batches import Batch
from cae2pipe.runtime.device import exact_float32
from cae2pipe.teachers.protocol import Teacher


class OnlineLatents:
    """Latents of a batch's views from the teacher itself, computed as in extraction, independent of the student's
    precision."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        with exact_float32(self.teacher.device):
            output = self.teacher(batch.pixels)
        # Copies: tensors made in inference mode cannot take part in a backward pass.
        if output.summary is None:
            return {"raw": output.tokens.clone()}
        return {"raw": output.tokens.clone(), "raw_summary": output.summary.unsqueeze(1).clone()}
