"""Scores of many evaluations, read from the folders that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cae2pipe.artifacts.artifact import MANIFEST, ScoresArtifact, is_foreign, open_artifact
from cae2pipe.artifacts.digest import canonical_json
from cae2pipe.comparison.rows import Finished
from cae2pipe.errors import Cae2pipeError, ManifestError, SourceError

COLUMNS = ("encoder", "evaluation", "feature", "score", "also", "best", "train", "val", "protocol", "folder")

HEADLINES = {"segment": ("miou", "pixel_accuracy"), "detect": ("ap_box", "ap_mask")}
"""The score of an evaluation and what stands beside it; elsewhere top1 and top5."""


def headlines(evaluation: str) -> tuple[str, str]:
    """The figure that an evaluation's score is, and the one that stands beside it."""
    return HEADLINES.get(evaluation, ("top1", "top5"))


class ScoredImages(BaseModel):
    """How many images an evaluation was made with."""

    model_config = ConfigDict(strict=True)

    train: int = Field(ge=0)
    val: int = Field(ge=0)


class ScoreResult(BaseModel):
    """What tables and reports take from a result: its other figures are there too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    evaluation: str
    encoder: str
    feature: str = ""
    protocol: str
    images: ScoredImages
    best: dict[str, float] | None = None

    @model_validator(mode="after")
    def _scored(self) -> ScoreResult:
        for name in headlines(self.evaluation):
            figures = [self.model_extra or {}, *([] if self.best is None else [self.best])]
            if not all(isinstance(one.get(name), float | int) for one in figures):
                raise ValueError(f"{name} is no number")
        return self

    def figure(self, name: str) -> float:
        """One of its scores, a share of 1."""
        value: float = (self.model_extra or {})[name]
        return value


class ScoreRow(TypedDict):
    """What the table shows of one result. ``score``: a share of 1, of what ``metric`` names; ``also``: another figure
    by its name; ``best``: the best epoch's score, where one was looked for; ``train``, ``val``: images."""

    encoder: str
    evaluation: str
    feature: str
    score: float
    also: dict[str, float]
    best: float | None
    train: int
    val: int
    protocol: str
    folder: str
    metric: str


def read_result(result: object, where: Path) -> ScoreResult:
    """A manifest's ``result``. Raises ManifestError where it is not one of an evaluation; the field is named."""
    try:
        return ScoreResult.model_validate(result)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("result", *first["loc"])))
        raise ManifestError(
            f"{field}: {first['msg']}", where=where, fix="delete the folder, then run `cae2pipe evaluate` again"
        ) from None


def score_artifacts(
    roots: Iterable[Path], damaged: list[Cae2pipeError] | None = None
) -> Iterator[tuple[Path, ScoresArtifact, ScoreResult]]:
    """Every finished evaluation in or below some folders, with its artifact and result.

    ``damaged`` takes the errors of manifests that cannot be read; None: the first one is raised.

    Raises:
        SourceError: a folder does not exist. ManifestError, DamageError: a manifest cannot be read.
    """
    for root in roots:
        if not root.is_dir():
            raise SourceError("no such folder", where=root, fix="give folders that `cae2pipe evaluate` wrote")
        for folder in sorted(path.parent for path in root.rglob(MANIFEST)):
            try:
                finished = finished_score(folder)
            except Cae2pipeError as error:
                if damaged is None:
                    raise
                damaged.append(error)
                continue
            if finished:
                yield folder, *finished


def finished_score(folder: Path) -> tuple[ScoresArtifact, ScoreResult] | None:
    """The artifact of a finished evaluation and its result; None: the folder holds something else.

    Raises:
        ManifestError, DamageError: its manifest cannot be read.
    """
    try:
        if is_foreign(folder):
            return None
        artifact = open_artifact(folder)
    except OSError as error:
        raise ManifestError(f"this cannot be read: {error.strerror}", where=folder / MANIFEST) from None
    if not isinstance(artifact, ScoresArtifact) or not (result := artifact.facts.get("result")):
        return None
    return artifact, read_result(result, folder / MANIFEST)


def collect(roots: Iterable[Path], damaged: list[Cae2pipeError] | None = None) -> list[ScoreRow]:
    """A row for every finished evaluation in or below the given folders, the best of each kind of evaluation first.
    ``damaged`` as in ``score_artifacts``.

    Raises:
        SourceError: a folder does not exist, or there is not one score.
    """
    rows: dict[Path, ScoreRow] = {}
    roots = list(roots)
    for folder, _, result in score_artifacts(roots, damaged):
        rows[folder.resolve()] = row(result, folder)
    if not rows and not damaged:
        raise SourceError(
            "there is no finished evaluation here",
            where=", ".join(str(root) for root in roots),
            fix="run `cae2pipe evaluate knn ENCODER DATA OUT`, then give OUT",
        )
    return sorted(rows.values(), key=lambda one: (one["evaluation"], -one["score"], str(one["folder"])))


def row(result: ScoreResult, folder: Path) -> ScoreRow:
    """What the table shows of one result."""
    first, second = headlines(result.evaluation)
    return {
        "encoder": result.encoder,
        "evaluation": result.evaluation,
        "feature": result.feature,
        "score": result.figure(first),
        "also": {second: result.figure(second)},
        "best": result.best[first] if result.best else None,
        "train": result.images.train,
        "val": result.images.val,
        "protocol": result.protocol,
        "folder": str(folder),
        "metric": first,
    }


def read_scores(roots: Iterable[Path]) -> dict[str, list[Finished]]:
    """All finished evaluations of exported encoders in or below some folders, by the encoder's SHA-256.

    Raises:
        SourceError: a folder does not exist. ManifestError, DamageError: a manifest below it cannot be read.
    """
    scores: dict[str, list[Finished]] = {}
    for _, artifact, result in score_artifacts(roots):
        digest = artifact.identity["encoder"].get("sha256")
        if digest:
            score = result.figure(headlines(result.evaluation)[0])
            data = canonical_json(artifact.identity["data"])
            one = Finished(result.evaluation, score, result.protocol, data, result.feature)
            if one not in scores.setdefault(digest, []):
                scores[digest].append(one)
    return scores
