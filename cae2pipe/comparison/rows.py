"""Runs side by side, as plain values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CURVES = {"loss": "loss", "centred_cosine_masked": "centred cosine, masked patches"}
"""Figures of ``metrics.jsonl`` that are drawn over epochs, with what they are called."""


@dataclass(frozen=True)
class Finished:
    """A finished evaluation of an encoder: what it is called, its headline as a share of 1, how and on which data it
    was taken, and what of the encoder it read."""

    evaluation: str
    score: float
    protocol: str
    data: str
    feature: str


@dataclass
class Row:
    """One variant, over its seeds.

    ``scores`` by column, one a seed, as shares of 1; ``paper``: the paper's own, in percent; ``runs``: folders of what
    is finished; ``unfinished``: other folders, with how far they are; ``curves``: means by epoch of the first run, by
    name as in ``CURVES``; ``hours``: device hours of each finished run; ``latents``: bytes that stored latents take a
    view, where the target set is known; ``features``: what of the encoder each column's scores read; ``along``: where
    on the comparison's axis, ``line`` on which curve; ``results``: finished evaluations, run by run; ``damaged``: lines
    of ``metrics.jsonl`` that cannot be read, of each run that has some.
    """

    name: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    paper: Mapping[Any, float] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)
    unfinished: list[tuple[Path, str]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    hours: list[float] = field(default_factory=list)
    latents: float | None = None
    features: dict[str, str] = field(default_factory=dict)
    along: float | None = None
    line: str = ""
    results: list[list[Finished]] = field(default_factory=list)
    damaged: dict[Path, int] = field(default_factory=dict)

    def mean(self, column: str) -> float | None:
        """The mean score over seeds, None without one."""
        return statistics.fmean(self.scores[column]) if self.scores.get(column) else None

    def error(self, column: str) -> float:
        """The standard error of that mean; 0 for a single seed, which says nothing of it."""
        scores = self.scores[column]
        return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0


@dataclass
class Comparison:
    """What is there of a grid, or of some runs.

    ``columns``: of scores, an evaluation each; ``protocols``: how each column's scores were taken; ``wanted``: scores
    that there are to be, in all; ``along``: what the axis measures, or empty; ``failed``: what could not be finished,
    and why.
    """

    title: str
    about: str
    columns: list[str]
    rows: list[Row]
    protocols: dict[str, str]
    wanted: int
    along: str = ""
    failed: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(len(scores) for row in self.rows for scores in row.scores.values())

    @property
    def seeds(self) -> int:
        """Runs of the variant that has most."""
        return max((len(row.runs) for row in self.rows), default=0)
