"""A codec's error by principal component of the latents and by token, and the views with the lowest cosine.

The manifest only has means. This needs the teacher's latents of some views.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch

from cae2pipe.targets.auditing import LiveViews
from cae2pipe.targets.calibration import token_cosines
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class LiveView:
    """A view with the teacher's latents now and the stored ones.

    pixels uint8 (S, S, 3); ``true`` and ``stored`` unit latents (P, D) of its patches; ``cosines``: centred, of its
    patches (P,); ``raw`` and ``centred``: mean cosines over all its tokens.
    """

    name: str
    pixels: np.ndarray
    true: np.ndarray
    stored: np.ndarray
    cosines: np.ndarray
    raw: float
    centred: float


@dataclass(frozen=True)
class FidelityProfile:
    """Of ``views`` views: mean cosines; ``variance`` (C,) of the teacher's latents along their principal axes, largest
    first, and ``error`` (C,), the mean squared error along the same axes; mean centred cosine by token (T,), the class
    token first if there is one; and the views with the lowest centred cosine, lowest first."""

    views: int
    raw: float
    centred: float
    variance: np.ndarray
    error: np.ndarray
    by_token: np.ndarray
    worst: list[LiveView]


NOTHING = 1e-9
"""Share of the variance below which an axis is not shown: some are empty if there are fewer tokens than dimensions."""


class ProfileBuilder:
    """Adds up views block by block; keeps only sums and the ``worst`` views."""

    def __init__(self, targets: TargetSet, worst: int):
        self.targets = targets
        teacher = targets.teacher
        self._most = worst
        self._views = 0
        self._sums = np.zeros(2)
        self._by_token = np.zeros(teacher.tokens)
        self._true, self._error = (torch.zeros(teacher.dim, teacher.dim, dtype=torch.float64) for _ in range(2))
        self._worst: list[tuple[float, int, LiveView]] = []

    def add(self, live: LiveViews) -> None:
        """Add views of a block."""
        teacher, mean = self.targets.teacher, self.targets.mean
        cosines = token_cosines(live.true, live.stored, mean)
        raw, centred = (values.view(len(live.names), -1).double().numpy() for values in cosines)
        true = (live.true - mean).flatten(0, 1).double()
        error = (live.stored - live.true).flatten(0, 1).double()
        self._true += true.T @ true
        self._error += error.T @ error
        self._sums += (raw.mean(axis=1).sum(), centred.mean(axis=1).sum())
        self._by_token += centred.sum(axis=0)
        for index, name in enumerate(live.names):
            view = LiveView(
                name,
                live.pixels[index],
                live.true[index, teacher.class_token :].numpy(),
                live.stored[index, teacher.class_token :].numpy(),
                centred[index, teacher.class_token :],
                float(raw[index].mean()),
                float(centred[index].mean()),
            )
            # The second entry breaks ties, so that views are never compared.
            heapq.heappush(self._worst, (-view.centred, -self._views - index, view))
            if len(self._worst) > self._most:
                heapq.heappop(self._worst)
        self._views += len(live.names)

    def profile(self) -> FidelityProfile | None:
        """The profile; None if no view was added."""
        if not self._views:
            return None
        tokens = self._views * self.targets.teacher.tokens
        values, axes = torch.linalg.eigh(self._true)
        variance = values.flip(0) / tokens
        error = ((axes.T @ self._error) * axes.T).sum(dim=1).flip(0) / tokens
        shown = int((variance > NOTHING * variance.sum()).sum())
        raw, centred = (self._sums / self._views).tolist()
        return FidelityProfile(
            views=self._views,
            raw=raw,
            centred=centred,
            variance=variance[:shown].numpy(),
            error=error[:shown].clamp_min(0).numpy(),
            by_token=self._by_token / self._views,
            worst=[view for _, _, view in sorted(self._worst, key=lambda item: item[:2], reverse=True)],
        )
