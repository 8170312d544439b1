"""Settings of comparisons: variants of one pretraining, each with several seeds, and their evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cae2pipe.config.base import Settings, build
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import PretrainSettings, TeacherWeight
from cae2pipe.errors import SettingsError

BYTES = "bytes"
EACH = "each"
EACH_NAME = "{each}"
"""Stands for a teacher's label in the name of a variant that makes a row for each target set."""

NOT_HERE = {
    "seed": "which is set by `seeds`",
    "stop_after": "but an unfinished run cannot be scored",
}
"""Pretraining settings that a grid may not set, and why."""

Evaluation = Literal["knn", "linear", "attentive", "finetune", "zeroshot"]


class Variant(Settings):
    """One row of a comparison."""

    name: str = Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")
    """The row's name. Where there is a row for each target set, {each} in it is the label of the set's teacher."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Pretraining settings that differ, section by section."""
    small: dict[str, Any] = Field(default_factory=dict)
    """Overrides `set` with --small."""
    codec: CodecSettings | None = None
    """Train on the target set recoded with this codec. The set must hold fp16 latents. null: on the set itself."""
    sets: tuple[Annotated[int, Field(ge=1)], ...] | Literal["each"] | None = None
    """Which of the target sets it trains from, by position, such as [1] or [1, 2], the first of them being the main
    one. null: all, together. each: a row for each set, trained from it alone."""
    weights: tuple[TeacherWeight, ...] | None = None
    """The weights of the losses of its sets' teachers, in the order of its sets. null: 1 for each."""
    favour: TeacherWeight | None = None
    """A row for each of its sets, in which the loss of that set's teacher has this weight, and of the others 1."""
    line: str = ""
    """The curve that it belongs to, if scores are plotted along a setting in several curves."""
    paper: dict[Evaluation, float] = Field(default_factory=dict)
    """The paper's scores in percent, by evaluation, for reference."""

    @property
    def repeated(self) -> bool:
        """Whether it makes a row for each target set."""
        return self.sets == EACH or self.favour is not None

    @model_validator(mode="after")
    def _together(self) -> Variant:
        if isinstance(self.sets, tuple) and (not self.sets or len(set(self.sets)) < len(self.sets)):
            raise ValueError(f"sets must be non-empty and unique, not {list(self.sets)}")
        losses = [values.get("loss") for values in (self.set, self.small)]
        ways = {
            "weights": self.weights is not None,
            "favour": self.favour is not None,
            "sets: each": self.sets == EACH,
            "set.loss.teachers": any(isinstance(loss, dict) and "teachers" in loss for loss in losses),
        }
        given = [name for name, there in ways.items() if there]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: use one of them")
        if self.repeated and EACH_NAME not in self.name:
            raise ValueError(f"this variant makes a row for each target set: its name must contain {EACH_NAME}")
        return self


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


def for_sets(grid: GridSettings, labels: Sequence[str]) -> GridSettings:
    """The grid for some target sets: every variant names its ``sets`` by position, and has a row of its own.

    Args:
        labels: of the sets' teachers.

    Raises:
        SettingsError: a variant does not fit the number of sets.
    """
    variants = [one.model_dump() for variant in grid.variants for one in rows_of(variant, labels)]
    return build(GridSettings, {**grid.model_dump(), "variants": variants}, where=grid.title)


def rows_of(variant: Variant, labels: Sequence[str]) -> list[Variant]:
    """The rows that a variant makes, as ``for_sets``."""
    where, count = f"variant {variant.name!r}", len(labels)
    sets = variant.sets if isinstance(variant.sets, tuple) else tuple(range(1, count + 1))
    if max(sets) > count:
        raise SettingsError(
            f"the variant trains from target set {max(sets)}, and there {'is' if count == 1 else 'are'} {count}",
            where=where,
            fix=f"give {max(sets)} target sets, one of each teacher, or change the variant's sets",
        )
    if len(sets) == 1 and (variant.repeated or variant.weights is not None):
        raise SettingsError(
            "the variant compares teachers, and it has one target set",
            where=where,
            fix="give a target set of each teacher: cae2pipe compare GRID TARGETS TARGETS DATA OUT",
        )
    if variant.weights is not None and len(variant.weights) != len(sets):
        raise SettingsError(
            f"the variant has {len(variant.weights)} weights for {len(sets)} target sets",
            where=where,
            fix="give one weight for each of its sets",
        )
    if not variant.repeated:
        return [variant.model_copy(update={"sets": sets})]
    rows = []
    for chosen in sets:
        own: dict[str, Any] = {"sets": (chosen,)}
        if variant.favour is not None:
            weights = tuple(variant.favour if each == chosen else 1.0 for each in sets)
            own = {"sets": sets, "weights": weights, "favour": None}
        name = variant.name.replace(EACH_NAME, labels[chosen - 1])
        rows.append(variant.model_copy(update={"name": name, **own}))
    return rows
