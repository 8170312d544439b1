"""Validated settings from a preset, a file or settings, with overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cae2pipe.artifacts.arguments import checked
from cae2pipe.config.base import Settings, build, load, merge, preset_names
from cae2pipe.config.stages import check_stage, settings_class
from cae2pipe.errors import SettingsError

S = TypeVar("S", bound=Settings)

Overrides = Mapping[str, Any] | Sequence[str] | None
"""Settings to change: ``{"optimizer.lr": 1e-3}``, ``{"optimizer": {"lr": 1e-3}}``, or ``["optimizer.lr=1e-3"]`` as on
the command line."""


@checked
def presets(stage: str) -> list[str]:
    """Names of the presets of a stage: shard, extract, pretrain, evaluate or compare.

    Raises:
        SettingsError: an unknown stage.
    """
    check_stage(stage)
    return preset_names(stage)


@checked
def settings(stage: str, config: str | Path, overrides: Overrides = None) -> Settings:
    """The resolved settings of a preset or a YAML file. Every function of this package takes them as ``config``.

    Args:
        stage: shard, extract, pretrain, evaluate or compare.

    Raises:
        SettingsError: an unknown stage, preset or setting, or a value that does not fit.
    """
    return resolve(settings_class(stage, str(config)), stage, config, overrides=overrides)


def resolve(
    kind: type[S], stage: str, config: str | Path | Settings, *, overrides: Overrides, values: Mapping[str, Any] = {}
) -> S:
    """Settings from ``config``, changed by ``values`` (from a function's own arguments) and then by ``overrides``.
    Raises SettingsError."""
    changed = dict(values)
    texts: Sequence[str] = ()
    if isinstance(overrides, Mapping):
        changed = merge(changed, nested(overrides))
    elif isinstance(overrides, str):
        raise SettingsError(
            f"{overrides!r} is a single string", where="overrides", fix="give a mapping or a list of strings"
        )
    elif overrides is not None:
        texts = overrides
    if not isinstance(config, Settings):
        return load(kind, stage, str(config), overrides=texts, values=changed)
    if not isinstance(config, kind):
        raise SettingsError(
            f"expected {kind.__name__}, got {type(config).__name__}",
            where="config",
            fix=f"give a preset, a YAML file, or what settings({stage!r}, ...) returns",
        )
    # Only values that were given: some defaults depend on how the folder was started.
    values_given = config.model_dump(exclude_unset=True)
    if texts:
        return load(kind, stage, None, overrides=texts, values=merge(values_given, changed))
    return build(kind, merge(values_given, changed), where=f"{stage} settings")


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides with dotted names as nested dictionaries.

    Raises:
        SettingsError: a name is not a string, or is empty.
    """
    result: dict[str, Any] = {}
    for name, value in overrides.items():
        if not isinstance(name, str) or not all(name.split(".")):
            raise SettingsError(
                f"{name!r} is not the name of a setting", where="overrides", fix='e.g. {"optimizer.lr": 1e-3}'
            )
        inner = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(name.split(".")):
            inner = {part: inner}
        result = merge(result, inner)
    return result


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def section(name: str, /, **values: Any) -> dict[str, Any]:
    """``{name: values}`` of those that are not None, or {} if there are none."""
    known = given(**values)
    return {name: known} if known else {}
