"""Settings of comparisons: variants of one pretraining, each with several seeds, and their evaluations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cae2pipe.config.base import Settings
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import PretrainSettings

BYTES = "bytes"

NOT_HERE = {
    "seed": "which is set by `seeds`",
    "stop_after": "but an unfinished run cannot be scored",
}
"""Pretraining settings that a grid may not set, and why."""

Evaluation = Literal["knn", "linear", "attentive", "finetune", "zeroshot"]


class Variant(Settings):
    """One row of a comparison."""

    name: str = Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")
    """The row's name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Pretraining settings that differ, section by section."""
    small: dict[str, Any] = Field(default_factory=dict)
    """Overrides `set` with --small."""
    codec: CodecSettings | None = None
    """Train on the target set recoded with this codec. The set must hold fp16 latents. null: on the set itself."""
    line: str = ""
    """The curve that it belongs to, if scores are plotted along a setting in several curves."""
    paper: dict[Evaluation, float] = Field(default_factory=dict)
    """The paper's scores in percent, by evaluation, for reference."""


class Scored(Settings):
    """One column of a comparison."""

    kind: Evaluation
    """The evaluation."""
    config: str | None = None
    """Its preset or YAML file. null: the preset of the same name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Its settings that differ."""


class GridSettings(Settings):
    """What `cae2pipe compare` runs."""

    title: str = Field(min_length=1)
    """The report's heading."""
    about: str = ""
    """What is compared, and the source of the paper's scores."""
    config: str = "base"
    """Pretraining preset or YAML file that all variants start from."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Pretraining settings that all variants share."""
    small: dict[str, Any] = Field(default_factory=dict)
    """Overrides `set` with --small: a scale for few cores and small data."""
    along: str = ""
    """Plot scores along this pretraining setting, such as mask.ratio, or along `bytes`, the bytes per view of stored
    latents. Variants where it is null are drawn as levels. Empty: no such plot."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once per seed."""
    variants: tuple[Variant, ...] = Field(min_length=1)
    """The rows."""
    evaluate: tuple[Scored, ...] = Field(default=(Scored(kind="knn"), Scored(kind="linear")), min_length=1)
    """The columns."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @field_validator("along")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("", BYTES):
            return value
        numeric_setting(PretrainSettings(), value)
        return value

    @model_validator(mode="after")
    def _distinct(self) -> GridSettings:
        names = [variant.name for variant in self.variants]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two variants have the name {twice[0]!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be non-empty and unique, not {list(self.seeds)}")
        for values in (self.set, self.small, *(part for v in self.variants for part in (v.set, v.small))):
            if name := next((name for name in NOT_HERE if name in values), None):
                raise ValueError(f"a grid cannot set {name}, {NOT_HERE[name]}")
        kinds = [scored.kind for scored in self.evaluate]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"evaluate must name each evaluation once, not {', '.join(kinds)}")
        return self


def numeric_setting(settings: Settings, name: str) -> float | None:
    """A setting by its dotted name, such as mask.ratio. Raises ValueError if it is missing or not a number."""
    value: object = settings
    for part in name.split("."):
        if not isinstance(value, Settings) or part not in type(value).model_fields:
            raise ValueError(f"there is no pretraining setting {name!r} to plot scores along")
        value = getattr(value, part)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"{name} is not a number: scores cannot be plotted along it")
    return value
