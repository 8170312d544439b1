"""A teacher's patch latents on another, coarser grid: the student's.

Each new cell is the mean of the teacher's cells weighted by the area that they share with it. So every cell counts
equally, the mean over the image is kept, and weights are never negative; where one grid divides the other it is the
plain mean of whole cells. Adaptive pooling would count some cells twice where it does not, and bicubic resampling has
negative weights, which give latents outside of what the teacher says of these cells.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.protocol import Teacher, TeacherOutput


def area_shares(length: int, size: int) -> Tensor:
    """Which share of each of ``length`` equal cells lies in each of ``size``: float64 (size, length); columns sum to
    1."""
    # In units of which a cell of the one grid has ``size``, and of the other ``length``, all bounds are integers.
    ends = torch.arange(length + 1) * size
    bounds = torch.arange(size + 1) * length
    above = torch.minimum(ends[None, 1:], bounds[1:, None])
    below = torch.maximum(ends[None, :-1], bounds[:-1, None])
    return (above - below).clamp(min=0).double() / size


class ResampledTeacher(Teacher):
    """A teacher whose patches are averaged by area to a coarser grid, after its final norm and projection.

    The class token and the summary are the teacher's own. Attention is summed, not averaged: it stays a share of the
    whole.

    Raises:
        TeacherError: the teacher's own grid is coarser than ``grid`` (rows, columns).
    """

    def __init__(self, teacher: Teacher, grid: tuple[int, int]):
        info = teacher.info
        own, (rows, cols) = (info.rows, info.cols), grid
        if rows > own[0] or cols > own[1]:
            raise TeacherError(
                f"teacher.grid {rows} x {cols} is finer than the teacher's own grid, {own[0]} x {own[1]}: "
                "latents would repeat",
                where="teacher.grid",
                fix="lower teacher.grid, or raise teacher.image_size",
            )
        super().__init__(replace(info, rows=rows, cols=cols), teacher.device)
        self.teacher, self._own = teacher, own
        self.attends, self.native, self.assumed = teacher.attends, teacher.native, teacher.assumed
        self._across, self._down = (
            area_shares(length, size).to(teacher.device, torch.float32)
            for length, size in ((own[1], cols), (own[0], rows))
        )
        self._mean = rows * cols / (own[0] * own[1])

    @property
    def unwrapped(self) -> Teacher:
        return self.teacher.unwrapped

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        output = self.teacher.tokens(pixels)
        # Autocast would compute the sums in half precision.
        with torch.autocast(self.device.type, enabled=False):
            attention = output.attention
            if attention is not None:
                attention = self._summed(attention.float().unsqueeze(-1)).squeeze(-1)
            return replace(
                output,
                tokens=self._resampled(output.tokens),
                attention=attention,
                layers={number: self._resampled(tokens) for number, tokens in output.layers.items()},
            )

    def _resampled(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D), the class token first if there is one, with their patches on the new grid."""
        tokens = tokens.float()
        prefix = int(self.info.class_token)
        return torch.cat([tokens[:, :prefix], self._summed(tokens[:, prefix:]) * self._mean], dim=1)

    def _summed(self, patches: Tensor) -> Tensor:
        """Sums (B, P', D) of patches (B, P, D) by share of their area."""
        cells = patches.unflatten(1, self._own)
        rows = torch.einsum("ij,bjcd->bicd", self._down, cells)
        return torch.einsum("kc,bicd->bikd", self._across, rows).flatten(1, 2)
