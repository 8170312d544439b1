"""How the settings of a folder differ from those requested now, and the options with which it resumes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cae2pipe.artifacts.difference import Difference
from cae2pipe.config.base import Settings, recorded

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


def resuming(differences: Sequence[Difference], fix: str, without: Sequence[str] = ()) -> str:
    """``fix``, after the options that give a folder's own settings, if those are all that differs.

    Args:
        without: sections that options cannot restore, such as a teacher's.
    """
    own = {name.removeprefix(f"{SECTION}."): old for name, old, _ in differences if name.startswith(f"{SECTION}.")}
    if not len(differences) == len(own) <= MOST or any(name.split(".")[0] in without for name in own):
        return fix
    options = shlex.join([part for name, old in own.items() for part in ("--set", f"{name}={json.dumps(old)}")])
    return fix if len(options) > LONGEST else f"{options} resumes it; or {fix}"
