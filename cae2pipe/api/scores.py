"""Python API of stage 3: evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.api.path_lists import encoder_name
from cae2pipe.api.settings import Overrides, resolve
from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.storage import to_local_path
from cae2pipe.comparison.scores import headlines
from cae2pipe.config.base import Settings
from cae2pipe.config.dense import DENSE, DetectSettings, SegmentSettings
from cae2pipe.config.evaluate import EVALUATIONS, AnySettings, ZeroshotSettings
from cae2pipe.errors import SettingsError
from cae2pipe.stages.evaluate import evaluate as run_evaluate
from cae2pipe.stages.evaluate_zeroshot import evaluate_zeroshot


class Score:
    """The result of an evaluation. Its scores are attributes: ``score.top1``, ``score.top5``, ``score.miou``, ...

    ``path`` is its folder, ``result`` the content of ``result.json``.
    """

    def __init__(self, path: Path, result: dict[str, Any]):
        self.path, self.result = path, result

    def __getattr__(self, name: str) -> float:
        value = self.__dict__.get("result", {}).get(name)
        if isinstance(value, float | int) and not isinstance(value, bool):
            return value
        raise AttributeError(f"this evaluation has no score {name!r}")

    def __repr__(self) -> str:
        names = headlines(self.evaluation, self.result.get("classes"))
        figures = ", ".join(f"{name}={self.result[name]:.4f}" for name in names)
        return f"Score({self.evaluation} of {self.encoder}: {figures})"

    @property
    def evaluation(self) -> str:
        """knn, linear, attentive, finetune, zeroshot, segment or detect."""
        return str(self.result["evaluation"])

    @property
    def encoder(self) -> str:
        """The encoder's name."""
        return str(self.result["encoder"])

    @property
    def protocol(self) -> str:
        """How the score was computed, in words."""
        return str(self.result["protocol"])


@checked
def evaluate(
    evaluation: str,
    encoder: str | Path,
    data: str | Path,
    *,
    out: str | Path,
    config: str | Path | Settings | None = None,
    overrides: Overrides = None,
    classes: str | Path | None = None,
    text: str | None = None,
    names: str | Path | None = None,
    teacher: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = True,
) -> Score | None:
    """Score an encoder: ``cae2pipe evaluate``.

    Args:
        evaluation: knn, linear, attentive, finetune, zeroshot, segment or detect.
        encoder: see ``load_encoder``.
        data: labelled images with train and val, for zeroshot only val; for segment label maps, for detect a folder in
            COCO's format.
        out: the folder of scores; this one's is ``out/evaluation``.
        config: preset (None: the evaluation's own), YAML file or settings.
        overrides: settings to change.
        classes: of zeroshot: a file of class embeddings.
        text: of zeroshot: a text tower of open_clip instead of it.
        names: of zeroshot, with ``text``: a file of the classes' names.
        teacher: of zeroshot, for a run of several teachers: the label of the one whose head is used.
        workers: processes; -1: one per core, 0: work in this process.
        device: auto, cpu, cuda, cuda:1, ...

    Returns:
        The score; under torchrun, None in all processes but the main one.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    known: dict[str, type[Settings]] = {**EVALUATIONS, **DENSE}
    if evaluation not in known:
        raise SettingsError(f"there is no evaluation {evaluation!r}", fix=f"use one of {', '.join(known)}")
    own = {"classes": classes, "text": text, "names": names, "teacher": teacher}
    if foreign := [name for name, value in own.items() if value is not None and evaluation != "zeroshot"]:
        raise SettingsError(f"{foreign[0]} is only for zeroshot, not for {evaluation}", fix="omit it")
    arguments = {"speed.workers": workers, "speed.device": device, **own}
    settings = resolve(known[evaluation], "evaluate", config or evaluation, overrides=overrides, arguments=arguments)
    encoder, data = encoder_name(encoder), to_local_path(data)
    folder = to_local_path(out, output=True)
    with reporting(progress, f"evaluate {evaluation}") as report:
        if isinstance(settings, SegmentSettings | DetectSettings):
            # Needs an extra that other evaluations do not need.
            from cae2pipe.stages.evaluate_dense import detect, segment

            if isinstance(settings, SegmentSettings):
                result = segment(encoder, data, folder, settings=settings, report=report)
            else:
                result = detect(encoder, data, folder, settings=settings, report=report)
        elif isinstance(settings, ZeroshotSettings):
            result = evaluate_zeroshot(encoder, data, out=folder, settings=settings, report=report)
        else:
            assert isinstance(settings, AnySettings)
            result = run_evaluate(evaluation, encoder, data, out=folder, settings=settings, report=report)
    return Score(folder / evaluation, result) if result else None
