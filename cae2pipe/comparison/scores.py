"""Scores of many evaluations, read from their folders."""

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
"""The main score of an evaluation and a second one; the default is top1 and top5."""


def headlines(evaluation: str, classes: object = None) -> tuple[str, ...]:
    """The names of an evaluation's main score, and of its second one: of at most five classes, top5 says nothing."""
    names = HEADLINES.get(evaluation, ("top1", "top5"))
    return names[:1] if names[1] == "top5" and isinstance(classes, int) and classes <= 5 else names


class ScoredImages(BaseModel):
    """Numbers of images of an evaluation."""

    model_config = ConfigDict(strict=True)

    train: int = Field(ge=0)
    val: int = Field(ge=0)


class ScoreResult(BaseModel):
    """The fields of a result that tables and reports use; others are allowed."""

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
                raise ValueError(f"{name} is not a number")
        return self

    def figure(self, name: str) -> float:
        """One of its scores, in 0..1."""
        value: float = (self.model_extra or {})[name]
        return value


class ScoreRow(TypedDict):
    """The row of one result in the table. ``score``: in 0..1, of the figure ``metric``; ``also``: another figure by
    name; ``best``: the best epoch's score, if epochs were scored; ``train``, ``val``: numbers of images."""

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
    """A manifest's ``result``. Raises ManifestError, which names the field, if it is not that of an evaluation."""
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
    """All finished evaluations in or below some folders: their artifacts and results.

    ``damaged`` collects the errors of unreadable manifests; None: the first one is raised.

    Raises:
        SourceError: a folder does not exist. ManifestError, DamageError: a manifest cannot be read.
    """
    for root in roots:
        if not root.is_dir():
            raise SourceError("no such folder", where=root, fix="give folders written by `cae2pipe evaluate`")
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
    """One row per finished evaluation in or below the given folders, the best of each kind of evaluation first.
    ``damaged`` as in ``score_artifacts``.

    Raises:
        SourceError: a folder does not exist, or there are no scores.
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
    """The row of one result."""
    first, *others = headlines(result.evaluation, (result.model_extra or {}).get("classes"))
    return {
        "encoder": result.encoder,
        "evaluation": result.evaluation,
        "feature": result.feature,
        "score": result.figure(first),
        "also": {name: result.figure(name) for name in others},
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
