"""All parts, the most important first."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.parts import Part

SIZES = ("tiny", "small", "base", "large")

# Estimates are seconds on one H100 with 16 cores and an empty compiler cache; most were measured. Concurrent parts take
# little more time together than the longest of them.
PARTS = (
    Part("A", "benchmarks.gpu.machine:describe", 8),
    # Is a step correct?
    Part("B1", "benchmarks.gpu.steps:against_cpu", 90),
    Part("B2", "benchmarks.gpu.steps:bf16_against_fp32", 8),
    Part("B3", "benchmarks.gpu.compiled:against_eager", 21, arguments=("base",)),
    Part("B4", "benchmarks.gpu.compiled:without_waiting", 5, needs_cuda="only CUDA can tell of a host that waits"),
    Part("B5", "benchmarks.gpu.divergence:nothing_spoilt", 13),
    Part("G-knn", "benchmarks.gpu.scores:nearest_neighbours", 40, "concurrent"),
    Part("G-detect", "benchmarks.gpu.dense:detection", 45, "concurrent"),
    Part("B7", "benchmarks.gpu.repeats:bit_for_bit", 105, "concurrent"),
    Part("B8", "benchmarks.gpu.ranks:one_process", 30, "concurrent"),
    Part("F", "benchmarks.gpu.exhaustion:out_of_memory", 120, "concurrent"),
    Part("G-train", "benchmarks.gpu.scores:trained", 90, "concurrent"),
    Part("G-segment", "benchmarks.gpu.dense:segmentation", 90, "concurrent"),
    Part("B3-rivals", "benchmarks.gpu.compiled:against_eager", 90, "concurrent", ("cae", "milan")),
    Part("E1", "benchmarks.gpu.latents:teacher", 22),
    Part("E2", "benchmarks.gpu.latents:codecs", 6),
    # How fast is it?
    Part("V", "benchmarks.gpu.views:rendering", 40, "alone"),
    Part("C-tiny", "benchmarks.gpu.speed:size", 61, "alone", ("tiny",)),
    Part("C-small", "benchmarks.gpu.speed:size", 52, "alone", ("small",)),
    Part("C-base", "benchmarks.gpu.speed:size", 106, "alone", ("base",)),
    Part("E3", "benchmarks.gpu.extracting:rates", 82, "alone"),
    Part("D-replayed", "benchmarks.gpu.feeding:loader", 150, "apart", ("replayed",)),
    Part("D-stored", "benchmarks.gpu.feeding:loader", 85, "apart", ("stored",)),
    Part("C-large", "benchmarks.gpu.speed:size", 120, "alone", ("large",)),
    Part("M5", "benchmarks.gpu.repeats:cost", 20, "apart"),
    Part("C-base-eager", "benchmarks.gpu.speed:size", 15, "alone", ("base", "eager")),
    Part("C-base-flash", "benchmarks.gpu.speed:size", 40, "alone", ("base", "flash")),
    Part("C-base-recompute", "benchmarks.gpu.speed:size", 40, "alone", ("base", "recompute")),
    Part("C-base-accumulation", "benchmarks.gpu.speed:size", 40, "alone", ("base", "accumulation")),
    Part("C-small-official", "benchmarks.gpu.speed:size", 30, "alone", ("small", "official")),
    Part("C-large-official", "benchmarks.gpu.speed:size", 65, "alone", ("large", "official")),
)


def select(names: str | None, sizes: Sequence[str]) -> list[Part]:
    """Parts by name, in the order of ``PARTS``; all if ``names`` is None. A name also selects all parts that start with
    it (``B``: B1, B2, ...; ``C-base``: its variants). Speed parts are limited to ``sizes``.

    Raises:
        ValueError: an unknown name or size.
    """
    if unknown := sorted(set(sizes) - set(SIZES)):
        raise ValueError(f"unknown size {unknown[0]}: use {', '.join(SIZES)}")
    asked = names.split(",") if names else [""]
    for name in asked:
        if not any(part.name.startswith(name) for part in PARTS):
            raise ValueError(f"unknown part {name}: use {', '.join(part.name for part in PARTS)}")
    return [
        part
        for part in PARTS
        if any(part.name.startswith(name) for name in asked)
        and (not part.run.endswith("speed:size") or part.arguments[0] in sizes)
    ]
