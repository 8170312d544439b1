"""What the demo measures, what each figure means, and which goals it has."""

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
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        sign, bound = self.goal(result)
        value = result[self.key]
        return {"≥": value >= bound, "≤": value <= bound, "<": value < bound}[sign]


MEASURES = (
    Measure("images", "training images", "Tiles that went through stage 1.", 0),
    Measure("views", "views an image", "Augmented views of each tile, seen once by the teacher and then stored.", 0),
    Measure(
        "bytes_per_view_fp16",
        "bytes a view, fp16",
        "What the teacher's latents and their norms take in half precision.",
        0,
    ),
    Measure(
        "bytes_per_view",
        "bytes a view, stored",
        "What they take as stored: rotated, rounded, packed. Pixels are not counted.",
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
    Measure("fidelity_p1", "fidelity, 1st percentile", "The same cosine for the worst hundredth of the tokens.", 5),
    Measure(
        "loss_first", "loss, first step", "An untrained student's distance from the targets: visible plus masked.", 3
    ),
    Measure(
        "loss_last",
        "loss, last epoch",
        "The trained student's, mean over its last epoch.",
        3,
        lambda r: ("<", r["loss_mean_token"]),
    ),
    Measure(
        "loss_mean_token", "loss of the mean token", "What answering with the mean target everywhere would cost.", 3
    ),
    Measure(
        "centred_cosine_masked",
        "centred cosine, masked",
        "On test tiles: agreement with the teacher where the student saw nothing, beyond the mean target. "
        "Answering with the mean scores about 0.",
        3,
        lambda r: ("≥", 0.15),
    ),
    Measure(
        "knn_random",
        "kNN, untrained student",
        "Test tiles whose photograph is recognised, same network before training.",
        3,
    ),
    Measure(
        "knn_pretrained",
        "kNN, pretrained student",
        "The same for the trained student, which never saw a label.",
        3,
        lambda r: ("≥", r["knn_random"] + 0.05),
    ),
    Measure("knn_teacher", "kNN, teacher", "The same for the teacher's own features.", 3),
    Measure("seconds", "seconds", "From the first command to this report.", 0),
)


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
        for measure in MEASURES
    ]
