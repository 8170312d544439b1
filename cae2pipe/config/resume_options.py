"""How the settings of a folder differ from those requested now, and the options with which it resumes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cae2pipe.artifacts.difference import Difference
from cae2pipe.config.base import Settings, recorded
from cae2pipe.config.yaml_core import read_yaml

SECTION = "settings"
MOST, LONGEST = 4, 200
"""Settings that a fix names, and their characters."""


def completed_as(kind: type[Settings]) -> Callable[[Mapping[str, object]], dict[str, object]]:
    """What completes an identity: its settings under their current names, with the values that were not recorded
    because the setting was added later."""

    def completed(identity: Mapping[str, object]) -> dict[str, object]:
        settings: Any = identity.get(SECTION)
        return {**identity, SECTION: recorded(kind, settings)} if isinstance(settings, dict) else dict(identity)

    return completed


def resuming(
    kind: type[Settings],
    differences: Sequence[Difference],
    fix: str,
    *,
    without: Sequence[str] = (),
    does: str = "resumes it",
) -> str:
    """``fix``, after the options that give a folder's own settings, if those are all that differs.

    Args:
        kind: of the settings. without: sections that options cannot restore, such as a teacher's. does: what they do.
    """
    own = {name.removeprefix(f"{SECTION}."): old for name, old, _ in differences if name.startswith(f"{SECTION}.")}
    names = [name for name in own if is_setting(kind, name) and name.split(".")[0] not in without]
    if not len(differences) == len(names) <= MOST:
        return fix
    options = shlex.join([part for name in names for part in ("--set", f"{name}={as_yaml(own[name])}")])
    return fix if len(options) > LONGEST else f"{options} {does}; or {fix}"


def is_setting(kind: type[Settings], name: str) -> bool:
    """Whether a dotted name is that of a single setting: not of a section, nor of an entry of a mapping."""
    first, _, rest = name.partition(".")
    inner = kind.model_fields[first].annotation if first in kind.model_fields else None
    if isinstance(inner, type) and issubclass(inner, Settings):
        return bool(rest) and is_setting(inner, rest)
    return first in kind.model_fields and not rest


def as_yaml(value: object) -> str:
    """A value as ``--set`` reads it back."""
    if isinstance(value, str):
        with suppress(ValueError):
            if read_yaml(value) == value:
                return value
    return json.dumps(value)
