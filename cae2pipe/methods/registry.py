"""Methods by name."""

from __future__ import annotations

import difflib

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.methods.caev2 import CAEv2

METHODS = {"caev2": CAEv2}


def build_method(name: str, settings: ModelSettings, target_dim: int) -> CAEv2:
    """The module of a method, freshly initialised from torch's global generator.

    Raises:
        SettingsError: unknown method.
    """
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1)
        raise SettingsError(
            f"there is no method {name!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
            where="method",
            fix=f"use one of {', '.join(METHODS)}",
        )
    return METHODS[name](settings, target_dim)
