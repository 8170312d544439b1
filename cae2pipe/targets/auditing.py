"""Checks stored latents against the teacher, which is run again on stored views chosen at random."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cae2pipe.runtime.keyed import keyed_permutation
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.calibration import token_cosines
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.groups import group_tokens
from cae2pipe.targets.store_layout import PATCHES, arrays_of
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.protocol import Teacher

TOLERANCE = 1e-3
"""Allowed loss of cosine besides the codec's: bf16 instead of fp32 costs 1.8e-4, another processor far less."""


@dataclass(frozen=True)
class Audit:
    """Cosines between the teacher's tokens now and those stored: means over all, and the worst view's mean.

    ``expected`` is the fidelity that the set's manifest records. All are of the patches; ``more``: of other groups.
    ``allowed``: by how much a sound view may be below the mean besides: the mean of its tokens is not below their first
    percentile, and where they are few, scatters further.
    """

    views: int
    raw: float
    centred: float
    worst: float
    worst_view: str
    expected: float
    more: Mapping[str, Audit] = field(default_factory=dict)
    allowed: float = 0.0

    @property
    def sound(self) -> bool:
        own = min(self.raw, self.worst + self.allowed) >= self.expected - TOLERANCE
        return own and all(audit.sound for audit in self.more.values())


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
    """Some stored views of a block: their names, pixels uint8 (n, H, W, 3), and by group the unit tokens (n, T, D), the
    teacher's now and those stored."""

    names: list[str]
    pixels: np.ndarray
    tokens: dict[str, tuple[Tensor, Tensor]]

    @property
    def true(self) -> Tensor:
        """The teacher's patches now."""
        return self.tokens[PATCHES][0]

    @property
    def stored(self) -> Tensor:
        """The stored patches."""
        return self.tokens[PATCHES][1]


def run_teacher_on(targets: TargetSet, teacher: Teacher, name: str, *, block: int, positions: list[int]) -> LiveViews:
    """Run the teacher on some views of a block of the store ``name``.

    Raises:
        DamageError: a stored view or its latents cannot be read. ImageError: a view cannot be decoded.
    """
    stored = targets.reader(name, targets.groups).block(block)
    pixels = targets.pixels(stored, positions)
    output = teacher(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(teacher.device))
    tokens = {}
    for group, own in targets.groups.items():
        true, _ = unit_tokens(group_tokens(output, group).cpu())
        decoded = own.layout.codec.decode(as_tensors(arrays_of(group, stored.arrays)))[positions]
        tokens[group] = true, decoded
    return LiveViews([f"{name}, key {stored.keys[position]}" for position in positions], pixels, tokens)


def audit(targets: TargetSet, teacher: Teacher, count: int, *, report: Report, seed: int = 0) -> Audit:
    """Run the teacher on ``count`` random stored views.

    Raises:
        DamageError: a stored view or its latents cannot be read.
    """
    cosines: dict[str, list[tuple[Tensor, Tensor]]] = {group: [] for group in targets.groups}
    labels: list[str] = []
    chosen = choose(targets, count, seed)
    report.phase("running the teacher on stored views")
    report.total(sum(map(len, chosen.values())), "views")
    for (name, block), positions in chosen.items():
        live = run_teacher_on(targets, teacher, name, block=block, positions=positions)
        for group, (true, stored) in live.tokens.items():
            raw, centred = token_cosines(true, stored, targets.groups[group].calibration.mean)
            by_view = raw.view(len(positions), -1).mean(dim=1), centred.view(len(positions), -1).mean(dim=1)
            cosines[group].append(by_view)
        labels += live.names
        report.advance(len(positions))

    def audited(group: str, more: Mapping[str, Audit]) -> Audit:
        raw, centred = (torch.cat([pair[part] for pair in cosines[group]]) for part in (0, 1))
        worst, figures = int(raw.argmin()), targets.fidelity(group)
        spread = figures["mean"] - figures["p1"]
        return Audit(
            views=len(raw),
            raw=float(raw.mean()),
            centred=float(centred.mean()),
            worst=float(raw[worst]),
            worst_view=labels[worst],
            expected=figures["mean"],
            more=more,
            allowed=spread * max(1.0, 4 / targets.groups[group].layout.tokens ** 0.5),
        )

    return audited(PATCHES, {group: audited(group, {}) for group in targets.groups if group != PATCHES})
