"""Checks stored latents against the teacher, which is run again on stored views chosen at random."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cae2pipe.runtime.keyed import keyed_permutation
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.calibration import token_cosines
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.protocol import Teacher

TOLERANCE = 1e-3
"""Allowed loss of cosine besides the codec's: bf16 instead of fp32 costs 1.8e-4, another processor far less."""


@dataclass(frozen=True)
class Audit:
    """Cosines between the teacher's tokens now and those stored: means over all, and the worst view's mean.

    ``expected`` is the fidelity that the set's manifest records.
    """

    views: int
    raw: float
    centred: float
    worst: float
    worst_view: str
    expected: float

    @property
    def sound(self) -> bool:
        return min(self.raw, self.worst) >= self.expected - TOLERANCE


def choose(targets: TargetSet, count: int, seed: int) -> dict[tuple[str, int], list[int]]:
    """``count`` stored views (all, if there are fewer) as positions in blocks: {(store, block): [positions]}."""
    names = sorted(targets.stores)
    ends = np.cumsum([targets.stores[name]["samples"] for name in names])
    chosen: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index in sorted(keyed_permutation(int(ends[-1]), "audit", seed)[:count].tolist()):
        store = int(np.searchsorted(ends, index, side="right"))
        position = index - (int(ends[store - 1]) if store else 0)
        chosen[names[store], position // BLOCK].append(position % BLOCK)
    return dict(chosen)


@dataclass(frozen=True)
class LiveViews:
    """Some stored views of a block: their names, pixels uint8 (n, H, W, 3), and unit tokens (n, T, D): ``true``, the
    teacher's now, and ``stored``."""

    names: list[str]
    pixels: np.ndarray
    true: Tensor
    stored: Tensor


def run_teacher_on(targets: TargetSet, teacher: Teacher, name: str, *, block: int, positions: list[int]) -> LiveViews:
    """Run the teacher on some views of a block of the store ``name``.

    Raises:
        DamageError: a stored view or its latents cannot be read. ImageError: a view cannot be decoded.
    """
    stored = targets.reader(name).block(block)
    pixels = targets.pixels(stored, positions)
    true, _ = unit_tokens(teacher(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(teacher.device)).tokens.cpu())
    decoded = targets.layout.codec.decode(as_tensors(stored.arrays))[positions]
    return LiveViews([f"{name}, key {stored.keys[position]}" for position in positions], pixels, true, decoded)


def audit(targets: TargetSet, teacher: Teacher, count: int, *, report: Report, seed: int = 0) -> Audit:
    """Run the teacher on ``count`` random stored views.

    Raises:
        DamageError: a stored view or its latents cannot be read.
    """
    raws: list[Tensor] = []
    centreds: list[Tensor] = []
    labels: list[str] = []
    chosen = choose(targets, count, seed)
    report.phase("running the teacher on stored views")
    report.total(sum(map(len, chosen.values())), "views")
    for (name, block), positions in chosen.items():
        live = run_teacher_on(targets, teacher, name, block=block, positions=positions)
        raw, centred = token_cosines(live.true, live.stored, targets.mean)
        raws.append(raw.view(len(positions), -1).mean(dim=1))
        centreds.append(centred.view(len(positions), -1).mean(dim=1))
        labels += live.names
        report.advance(len(positions))
    raw, centred = torch.cat(raws), torch.cat(centreds)
    worst = int(raw.argmin())
    return Audit(
        views=len(raw),
        raw=float(raw.mean()),
        centred=float(centred.mean()),
        worst=float(raw[worst]),
        worst_view=labels[worst],
        expected=targets.fidelity()["mean"],
    )
