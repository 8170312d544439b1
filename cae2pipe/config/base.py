"""Typed settings: presets in YAML, overrides, validation, documentation, fingerprints.

A settings class documents every field in the docstring below it. Fields that only change speed are in a section called
``speed``; fields that only say where something is, or how much of it to make, are declared with
``not_fingerprinted()``. Neither enters fingerprints; everything else does.
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from cae2pipe.artifacts.json_files import read_document
from cae2pipe.artifacts.storage import to_local_path
from cae2pipe.config.yaml_core import read_yaml
from cae2pipe.errors import SettingsError


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values are checked, instances do not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, values: Any) -> Any:
        """Refuse true and false for numbers, and numbers that a manifest cannot hold."""
        for name, info in cls.model_fields.items() if isinstance(values, dict) else ():
            value = values.get(name)
            items = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(item, bool) for item in items) and not takes(info.annotation, bool):
                raise ValueError(f"{name} must be a number, not true or false")
            if any(isinstance(item, int) and abs(item) >= 2**63 for item in items):
                raise ValueError(f"{name} has more than 64 bits")
        return values


def takes(annotation: Any, kind: type) -> bool:
    """Whether values of a type fit an annotation without conversion."""
    return annotation in (kind, Any) or any(takes(part, kind) for part in get_args(annotation))


S = TypeVar("S", bound=Settings)

STORED_NAMES = {
    "predictor_depth": "regressor_depth",
    "predictor_width": "regressor_width",
    "predictor_heads": "regressor_heads",
    "predictor_layer_scale": "regressor_layer_scale",
}
"""Renamed settings, with the old names that manifests and fingerprints keep, so that existing folders can be
resumed."""
PRESENT_NAMES = {stored: name for name, stored in STORED_NAMES.items()}


def not_fingerprinted(default: Any = ..., **options: Any) -> Any:
    """A field that does not enter fingerprints: a path, or an amount that may grow."""
    return Field(default, json_schema_extra={"identity": False}, **options)


def added(default: Any, before: Any, **options: Any) -> Any:
    """A field that folders of older versions do not have; they were made with the value ``before``.

    It enters fingerprints only with another value, so that fingerprints of older folders do not change.
    """
    return Field(default, json_schema_extra={"before": before}, **options)


def fingerprinted(settings: Settings) -> dict[str, Any]:
    """The settings that change the result, as plain JSON values under their names in manifests."""
    result = {}
    for name, info in type(settings).model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if name == "speed" or extra.get("identity") is False:
            continue
        value = getattr(settings, name)
        if "before" in extra and value == extra["before"]:
            continue
        plain = fingerprinted(value) if isinstance(value, Settings) else settings.model_dump(mode="json")[name]
        result[STORED_NAMES.get(name, name)] = plain
    return result


def recorded(kind: type[Settings], values: Mapping[str, object]) -> dict[str, Any]:
    """A manifest's settings under their current names, with ``before`` values for fields ``added`` later."""
    result: dict[str, Any] = {PRESENT_NAMES.get(name, name): value for name, value in values.items()}
    for name, info in kind.model_fields.items():
        extra, inner = info.json_schema_extra, info.annotation
        if isinstance(extra, dict) and "before" in extra:
            result.setdefault(name, extra["before"])
        elif isinstance(inner, type) and issubclass(inner, Settings) and isinstance(result.get(name), dict):
            result[name] = recorded(inner, result[name])
    return result


def build_recorded(kind: type[S], values: Mapping[str, object], where: object) -> S:
    """The settings in a manifest. Raises SettingsError if they are invalid."""
    return build(kind, recorded(kind, values), where)


def section_of(values: Mapping[str, object], name: str, where: object) -> Mapping[str, object]:
    """A section of a manifest's settings. Raises SettingsError if it is not a section."""
    inner = values.get(name)
    if not isinstance(inner, dict):
        raise SettingsError(f"settings.{name} is not a mapping", where=where)
    return inner


def package_folder(name: str) -> Path:
    """A folder of data files in the package, such as ``configs``."""
    return Path(str(importlib.resources.files("cae2pipe"))) / name


def preset_names(stage: str) -> list[str]:
    """The names of presets. Files whose names begin with ``_`` are included by others."""
    names = sorted(path.stem for path in (package_folder("configs") / stage).glob("*.yaml"))
    return [name for name in names if not name.startswith("_")]


def read_preset(stage: str, name: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The raw values of a preset by name, or of a YAML file by path. ``extends: NAME`` at its top starts from another.

    ``below``: the presets that extend this one.

    Raises:
        SettingsError: unknown preset, unreadable file, presets that extend each other in a circle.
    """
    if name in below:
        chain = " -> ".join((*below, name))
        raise SettingsError(f"settings extend each other in a circle: {chain}", where=name, fix="correct `extends`")
    path = to_local_path(name)
    is_path = path.suffix in (".yaml", ".yml") or "/" in name
    if not is_path:
        path = package_folder("configs") / stage / f"{name}.yaml"
        if not path.is_file():
            known = preset_names(stage)
            raise SettingsError(
                f"unknown {stage} preset {name!r}{_nearest(name, known)}",
                where=f"{stage} preset {name}",
                fix=f"use one of {', '.join(known)}, or the path of a YAML file",
            )
    try:
        data = read_document(path, fix="check the path", error=SettingsError, limit=2**20)
        values = read_yaml(data.decode("utf-8"))
    except FileNotFoundError:
        raise SettingsError("no such settings file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise SettingsError("this is a folder, not a YAML file", where=path, fix="check the path") from None
    except OSError as error:
        raise SettingsError(f"this cannot be read: {error.strerror}", where=path, fix="check the path") from None
    except ValueError as error:
        raise SettingsError(f"this is not valid YAML: {error}", where=path, fix="correct the file") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SettingsError("a settings file must be a mapping", where=path, fix="correct the file")
    parent = values.pop("extends", None)
    return merge(read_preset(stage, str(parent), (*below, name)), values) if parent else values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` overridden by the values of ``over``, section by section."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=c`` as a nested dictionary; the value is read as YAML.

    Raises:
        SettingsError: no ``=``, no name, or a value that is not YAML.
    """
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")) or name.count(".") > 9:
        raise SettingsError(
            f"invalid override {text!r}, expected section.name=value", where="--set", fix="e.g. --set seed=1"
        )
    try:
        parsed = read_yaml(value)
    except ValueError as error:
        raise SettingsError(f"the value is not valid YAML: {error}", where=f"--set {text}", fix="quote it") from None
    *sections, last = name.split(".")
    nested = {last: parsed}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def load(
    kind: type[S],
    stage: str,
    preset: str | None,
    *,
    overrides: Sequence[str] = (),
    values: dict[str, Any] | None = None,
    options: Mapping[str, str] = {},
    replaced: Mapping[str, Any] = {},
) -> S:
    """Preset, then ``values`` (from dedicated ``options``, as in ``build``), then ``--set`` overrides, validated.

    ``replaced``: sections that take the place of the preset's, of which nothing remains.

    A preset may have ``recipes: {NAME: {...}}``: settings that apply if ``recipe`` is NAME. Overrides take precedence.

    Raises:
        SettingsError: an invalid value, or an unknown key, with the nearest known name.
    """
    raw = read_preset(stage, preset) if preset else {}
    recipes = raw.pop("recipes", {})
    over = values or {}
    for override in overrides:
        parsed = parse_override(override)
        over = merge(over, parsed)
        options = {name: option for name, option in options.items() if not has(parsed, name)}
    recipe = str(over.get("recipe", raw.get("recipe", "")))
    for name, part in (("recipes", recipes), (f"recipes.{recipe}", part_of(recipes, recipe))):
        if not isinstance(part, dict):
            raise SettingsError(f"{name} is not a mapping", where=preset, fix="correct the file")
    raw = merge({**merge(raw, part_of(recipes, recipe)), **replaced}, over)
    return build(kind, raw, where=f"{stage} settings" + (f", preset {preset}" if preset else ""), options=options)


def has(values: Mapping[str, Any], name: str) -> bool:
    """Whether nested values contain a dotted name."""
    first, _, rest = name.partition(".")
    inner = values.get(first)
    return first in values and (not rest or not isinstance(inner, Mapping) or has(inner, rest))


def part_of(recipes: Any, name: str) -> Any:
    """The entry of a preset's ``recipes`` under a name."""
    return recipes.get(name, {}) if isinstance(recipes, dict) else {}


def build(kind: type[S], raw: Mapping[str, object], where: object, *, options: Mapping[str, str] = {}) -> S:
    """Validate raw values into a settings object. ``options``: dotted names of settings that were given by an option of
    their own, with its name, such as ``--views``. Raises SettingsError if values are invalid."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known, unknown = _known_names(kind, first["loc"][:-1]), str(first["loc"][-1])
            nearest = [name for name in known if name == PRESENT_NAMES.get(unknown)]
            nearest = nearest or difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
            prefix = ".".join(str(part) for part in first["loc"][:-1])
            full = ".".join(filter(None, (prefix, *nearest[:1])))
            fix = f"did you mean {full!r}?" if nearest else f"known names: {', '.join(known)}"
            raise SettingsError(f"unknown setting {field!r}{more}", where=where, fix=fix) from None
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, SettingsError):
            raise cause from None
        got = "" if isinstance(first["input"], dict) else f"; got {shortened(repr(first['input']))}"
        if cause:  # one of our cross-field checks, whose message says what to change
            raise SettingsError(f"{cause}{more}", where=where) from None
        if option := options.get(field):
            raise SettingsError(f"{option}: {first['msg']}{got}{more}", where=where, fix=f"change {option}") from None
        raise SettingsError(f"{field}: {first['msg']}{got}{more}", where=where, fix=f"--set {field}=...") from None


def shortened(text: str, most: int = 80) -> str:
    """A long text, truncated."""
    return text if len(text) <= most else text[: most - 3] + "..."


def show(settings: Settings, indent: str = "") -> str:
    """The resolved settings as YAML with each field's documentation above it."""
    lines = []
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            doc = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{indent}# {doc}", f"{indent}{name}:", show(value, indent + "  ")]
        else:
            plain = settings.model_dump(mode="json")[name]
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            lines += [f"{indent}# {_one_line(info)}", f"{indent}{name}: {text}"]
    return "\n".join(lines).strip("\n") if not indent else "\n".join(lines)


def _one_line(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _known_names(kind: type[BaseModel], location: Iterable[Any]) -> list[str]:
    for part in location:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            kind = annotation
    return sorted(kind.model_fields)


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {match[0]!r})" if match else ""
