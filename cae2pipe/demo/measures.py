"""The demo's measures: their meaning and their goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Result = Mapping[str, float]


@dataclass(frozen=True)
class Measure:
    """One key of ``result.json``. ``goal`` gives the bound to reach and whether larger or smaller values reach it."""

    key: str
    name: str
    meaning: str
    digits: int
    goal: Callable[[Result], tuple[str, float]] | None = None

    def show(self, result: Result) -> str:
        return f"{result[self.key]:,.{self.digits}f}"

    def show_goal(self, result: Result) -> str:
        if self.goal is None:
            return ""
        sign, bound = self.goal(result)
        return f"{sign} {bound:,.{self.digits}f}"

    def met(self, result: Result) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        sign, bound = self.goal(result)
        value = result[self.key]
        return {"≥": value >= bound, "≤": value <= bound, "<": value < bound}[sign]


MEASURES = (
    Measure("images", "training images", "Tiles processed by stage 1.", 0),
    Measure("views", "views per image", "Augmented views of each tile, seen once by the teacher and then stored.", 0),
    Measure(
        "bytes_per_view_fp16",
        "bytes per view, fp16",
        "Size of the teacher's latents and their norms in half precision.",
        0,
    ),
    Measure(
        "bytes_per_view",
        "bytes per view, stored",
        "Their size as stored: rotated, rounded, compressed. Without pixels.",
        0,
        lambda r: ("≤", 0.15 * r["bytes_per_view_fp16"]),
    ),
    Measure(
        "fidelity_mean",
        "fidelity, mean",
        "Cosine between stored and true latents, mean over all tokens of all views.",
        5,
        lambda r: ("≥", 0.97),
    ),
    Measure("fidelity_p1", "fidelity, 1st percentile", "The same cosine, 1st percentile over all tokens.", 5),
    Measure("loss_first", "loss, first step", "Loss of the untrained student: visible plus masked.", 3),
    Measure(
        "loss_last",
        "loss, last epoch",
        "Loss of the trained student, mean over its last epoch.",
        3,
        lambda r: ("<", r["loss_mean_token"]),
    ),
    Measure("loss_mean_token", "loss of the mean token", "The loss of predicting the mean target everywhere.", 3),
    Measure(
        "centred_cosine_masked",
        "centred cosine, masked",
        "On test tiles: agreement with the teacher on masked patches, beyond the mean target. "
        "Predicting the mean scores about 0.",
        3,
        lambda r: ("≥", 0.15),
    ),
    Measure(
        "knn_random",
        "kNN, untrained student",
        "Share of test tiles whose photograph is recognised, same network before training.",
        3,
    ),
    Measure(
        "knn_pretrained",
        "kNN, pretrained student",
        "The same for the trained student, which never saw a label.",
        3,
        lambda r: ("≥", r["knn_random"] + 0.05),
    ),
    Measure("knn_teacher", "kNN, teacher", "The same for the teacher's features.", 3),
    Measure("seconds", "seconds", "From the first command to this report.", 0),
)


def measured(result: Result) -> list[Measure]:
    """The measures of a result: ``seconds`` are missing if the demo was interrupted and resumed."""
    return [measure for measure in MEASURES if measure.key in result]


def rows(result: Result) -> list[dict[str, str]]:
    """The table that ends the demo: measure, value, goal, and whether it was reached."""
    marks = {True: "reached", False: "missed", None: ""}
    return [
        {
            "measure": measure.name,
            "value": measure.show(result),
            "goal": measure.show_goal(result),
            "": marks[measure.met(result)],
        }
        for measure in measured(result)
    ]
