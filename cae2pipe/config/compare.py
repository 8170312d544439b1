"""Settings of comparisons: variants of one pretraining, each with several seeds, and what each is scored by."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cae2pipe.config.base import Settings

Evaluation = Literal["knn", "linear", "attentive", "finetune"]


class Variant(Settings):
    """One row of a comparison."""

    name: str = Field(min_length=1)
    """What the row is called."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Pretraining settings that differ, section by section."""
    paper: dict[str, float] = Field(default_factory=dict)
    """The paper's own figures, in percent, by evaluation: for orientation."""


class Scored(Settings):
    """One column of a comparison."""

    kind: Evaluation
    """The evaluation."""
    config: str | None = None
    """Its preset or YAML file. null: the one of its name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Its settings that differ."""


class GridSettings(Settings):
    """What `cae2pipe compare` runs."""

    title: str = Field(min_length=1)
    """The report's heading."""
    about: str = ""
    """What is compared, and where the paper's figures come from."""
    config: str = "base"
    """Pretraining preset, or YAML file, that all variants begin with."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Pretraining settings that all variants share."""
    small: dict[str, Any] = Field(default_factory=dict)
    """Laid over `set` with --small: a scale for few cores and small data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each."""
    variants: tuple[Variant, ...] = Field(min_length=1)
    """The rows."""
    evaluate: tuple[Scored, ...] = (Scored(kind="knn"), Scored(kind="linear"))
    """The columns."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _distinct(self) -> GridSettings:
        slugs = [slug(variant.name) for variant in self.variants]
        if twice := [name for name in slugs if slugs.count(name) > 1]:
            raise ValueError(f"two variants are called {twice[0]!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: give at least one, each once")
        kinds = [scored.kind for scored in self.evaluate]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"evaluate names {', '.join(kinds)}: each once")
        return self


def slug(name: str) -> str:
    """A name as part of a path: letters and digits, everything else a hyphen."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "variant"
