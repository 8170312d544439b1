"""Validated settings from a preset, a file or settings, with overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cae2pipe.artifacts.arguments import checked
from cae2pipe.config.base import Settings, build, has, load, merge, preset_names
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
    kind: type[S],
    stage: str,
    config: str | Path | Settings,
    *,
    overrides: Overrides,
    arguments: Mapping[str, Any] = {},
    replaced: Mapping[str, Any] = {},
) -> S:
    """Settings from ``config``, changed by a function's own ``arguments`` and then by ``overrides``.

    Args:
        arguments: values by the dotted names of their settings, those that are not None. The option of the same command
            is named after the argument: see ``option``.
        replaced: sections that take the place of those of ``config``, of which nothing remains.

    Raises:
        SettingsError: an unknown preset or setting, or a value that does not fit.
    """
    own = {name: value for name, value in arguments.items() if value is not None}
    options = {name: option(name) for name in own}
    changed = nested(own)
    texts: Sequence[str] = ()
    if isinstance(overrides, Mapping):
        over = nested(overrides)
        changed = merge(changed, over)
        options = {name: option for name, option in options.items() if not has(over, name)}
    elif isinstance(overrides, str):
        raise SettingsError(
            f"{overrides!r} is a single string", where="overrides", fix="give a mapping or a list of strings"
        )
    elif overrides is not None:
        texts = overrides
    if not isinstance(config, Settings):
        return load(kind, stage, str(config), overrides=texts, values=changed, options=options, replaced=replaced)
    if not isinstance(config, kind):
        raise SettingsError(
            f"expected {kind.__name__}, got {type(config).__name__}",
            where="config",
            fix=f"give a preset, a YAML file, or what settings({stage!r}, ...) returns",
        )
    # Only values that were given: some defaults depend on how the folder was started.
    values_given = {**config.model_dump(exclude_unset=True), **replaced}
    if texts:
        return load(kind, stage, None, overrides=texts, values=merge(values_given, changed), options=options)
    return build(kind, merge(values_given, changed), where=f"{stage} settings", options=options)


OPTIONS = {
    "codec.name": "codec",
    "mask.repeat": "repeat_masks",
    "probe.images": "probe",
    "probe.targets": "probe_targets",
    "targets": "online",
}
"""Arguments that are not named like the last part of their setting."""


def option(name: str) -> str:
    """How messages call a setting that was given by an argument or option of its own."""
    argument = OPTIONS.get(name, name.rpartition(".")[2])
    return f"{argument} (--{argument.replace('_', '-')})"


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
