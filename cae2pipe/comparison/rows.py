"""A comparison of runs, as plain values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CURVES = {"loss": "loss", "centred_cosine_masked": "centred cosine, masked patches"}
"""Figures of ``metrics.jsonl`` that are plotted over epochs, with their labels."""

PROBES = {"knn_top1": "kNN accuracy, %", "held_out_loss": "loss on held-out views"}
"""Figures of ``probe.jsonl`` that are plotted over epochs, with their labels."""


@dataclass(frozen=True)
class Finished:
    """A finished evaluation of an encoder: its name, its main score in 0..1, its protocol and data, and the features of
    the encoder that it used."""

    evaluation: str
    score: float
    protocol: str
    data: str
    feature: str


@dataclass(frozen=True)
class Taught:
    """A teacher of a run: its label, the weight of its loss, the licence of its weights, and the bytes per view of its
    stored latents, if its target set is known."""

    label: str
    weight: float
    licence: str
    latents: float | None


@dataclass
class Row:
    """One variant, over its seeds.

    ``scores`` by column, one per seed, in 0..1; ``paper``: the paper's own, in percent; ``runs``: folders of finished
    runs; ``unfinished``: other folders, with their progress; ``curves``: means by epoch of the first run, by name as in
    ``CURVES``; ``probes``: the first run's probes, by name as in ``PROBES``, as (epochs done, figure); ``hours``:
    device hours of each finished run; ``teachers``: those of its runs, the first one's set being the main one; empty
    for pixel targets; ``latents``: bytes per view of stored latents, of all teachers, if the target sets are known;
    ``features``: features of the encoder that each column's scores use; ``along``: position on the comparison's axis,
    ``line``: the curve it belongs to; ``results``: finished evaluations, run by run; ``damaged``: how many lines of
    ``metrics.jsonl`` are unreadable, for each run that has such lines.
    """

    name: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    paper: Mapping[Any, float] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)
    unfinished: list[tuple[Path, str]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    probes: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    hours: list[float] = field(default_factory=list)
    teachers: list[Taught] = field(default_factory=list)
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
        """The standard error of that mean; 0 for a single seed, which gives no estimate."""
        scores = self.scores[column]
        return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0


@dataclass
class Comparison:
    """The results of a grid, or of some runs.

    ``columns``: of scores, one per evaluation; ``protocols``: the protocol of each column; ``wanted``: total number of
    planned scores; ``along``: label of the axis, or empty; ``failed``: jobs that could not be finished, with reasons.
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
        """Number of runs of the variant with the most."""
        return max((len(row.runs) for row in self.rows), default=0)
