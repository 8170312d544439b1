"""A model card: architecture, training, usage and scores of an exported encoder."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.artifacts.manifest_run import RunTeacher
from cae2pipe.artifacts.manifest_values import UNKNOWN
from cae2pipe.comparison.scores import ScoreRow
from cae2pipe.config.base import build_recorded
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.models.formats import ExportLayout, Shape
from cae2pipe.reporting.markdown import escaped
from cae2pipe.reporting.results import as_markdown
from cae2pipe.reporting.target_set_facts import licence_rows
from cae2pipe.version import __version__

UNTRAINED = (
    "**The class token had no loss in training: use the mean of the patch tokens.** "
    "`cae2pipe evaluate` scores it with `--set features.feature=mean`."
)
PAPER = "CAE v2: Context Autoencoder with CLIP Latent Alignment"


def model_card(
    name: str,
    layout: ExportLayout,
    shape: Shape,
    *,
    run: RunArtifact | None,
    scores: Sequence[ScoreRow],
    class_token: bool,
) -> str:
    """The text of ``README.md``, in Markdown with the front matter that model hubs read.

    Args:
        name: name of the encoder. run: the artifact of the run that trained it, if known. scores: rows as ``results``
        collects them. class_token: whether the class token had a loss in training.
    """
    matter = yaml.safe_dump(
        {"library_name": layout.library, "pipeline_tag": "image-feature-extraction", "tags": ["cae2pipe", "vit"]},
        sort_keys=False,
    )
    parts = [
        f"---\n{matter}---",
        f"# {escaped(name)}",
        f"A vision transformer: {shape.depth} blocks of width {shape.width} with {shape.heads} heads, patches of "
        f"{shape.patch_size} pixels, images of {shape.image_size}. Written by cae2pipe {__version__}.",
        f"Images are resized to {shape.resize} pixels along their shorter side (bicubic), cropped to the central "
        f"{shape.image_size}, and normalised with mean {_channels(shape.mean)} and standard deviation "
        f"{_channels(shape.std)} of pixels in [0, 1].",
        f"```python\n{layout.usage}\n```",
        *([] if class_token else [UNTRAINED]),
    ]
    if run:
        parts += ["## Training", _training(run)]
    if scores:
        parts += ["## Scores", as_markdown([{**row, "folder": ""} for row in scores])]
    return "\n\n".join(parts) + "\n"


def _training(run: RunArtifact) -> str:
    settings = build_recorded(PretrainSettings, run.identity["settings"], where=run.root)
    loss, masks = settings.loss, settings.mask
    rows = {
        "method": f"{settings.method} ({PAPER}), recipe {settings.recipe}",
        **_teachers(run),
        "targets": f"{settings.targets}, target set {run.identity['targets'][:16]}",
        **({"started from": _init(run)} if "init" in run.facts else {}),
        "epochs": settings.epochs,
        "batch": settings.data.batch,
        "masked patches": f"{masks.count or f'{100 * masks.ratio:g}%'}, {masks.strategy}",
        "loss": f"{loss.kind}, visible {loss.visible:g}, masked {loss.masked:g}",
        "seed": settings.seed,
        "run": run.fingerprint[:16],
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {escaped(str(value))} |" for name, value in rows.items())])


def _teacher(facts: RunTeacher) -> str:
    """Older runs do not record its library and weights."""
    name = str(facts["name"])
    if "library" in facts:
        name += f" ({facts['library']}), weights {facts['weights'][:16]}"
    return name


def _teachers(run: RunArtifact) -> dict[str, str]:
    """The rows about the teacher, or about all of several, with licences."""
    if "teachers" not in run.facts:
        return {"teacher": _teacher(run.facts["teacher"]), **dict(licence_rows(run.facts.get("licences", {})))}
    rows = {}
    for known in run.facts["teachers"]:
        licence = known["licences"].get("teacher", UNKNOWN)
        rows[f"teacher {known['label']}"] = f"{_teacher(known)}, licence {licence}"
    first = run.facts.get("licences", {})
    return {**rows, "licence of the images": first.get("data", UNKNOWN)}


def _init(run: RunArtifact) -> str:
    return f"{run.facts['init']}, weights {run.identity['init'][:16]}"


def _channels(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
