"""What a batch of a target set holds in training loops of your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class TargetBatch(NamedTuple):
    """B stored views of a target set.

    ``pixels`` (B, 3, H, W): uint8, or float32 from 0 to 1. ``targets``: the teacher's latents, float32 (B, D, rows,
    cols) or (B, T, D). ``keys``: of their images. ``labels`` (B,) int64: indices into the set's ``classes``, -1: none.
    ``views`` (B,) int64: which of the stored views of its image each one is. Tensors are on the device asked for.
    """

    pixels: Tensor
    targets: Tensor
    keys: list[str]
    labels: Tensor
    views: Tensor


class TargetBatchWithGroups(NamedTuple):
    """The fields of ``TargetBatch``, and other latents of the teacher.

    ``summary`` (B, W) float32: its own output for the view; None if not asked for. ``layers``: as ``targets`` for the
    tokens of other blocks, by the block's number.
    """

    pixels: Tensor
    targets: Tensor
    keys: list[str]
    labels: Tensor
    views: Tensor
    summary: Tensor | None
    layers: Mapping[int, Tensor]


class TargetBatchOfTeachers(NamedTuple):
    """B views of several target sets.

    ``targets``, ``summary`` and ``layers`` hold what the fields of ``TargetBatchWithGroups`` do, by the label of each
    teacher. ``summary`` and ``layers`` lack teachers without them, and are empty if not asked for.
    """

    pixels: Tensor
    targets: Mapping[str, Tensor]
    keys: list[str]
    labels: Tensor
    views: Tensor
    summary: Mapping[str, Tensor]
    layers: Mapping[str, Mapping[int, Tensor]]
