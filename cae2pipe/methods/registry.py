"""Methods by name. To add one, write a file with its class and the line ``register("name", Class)``."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.methods.cae import CAE
from cae2pipe.methods.caev2 import CAEv2
from cae2pipe.methods.fd import FeatureDistillation
from cae2pipe.methods.mae import MAE
from cae2pipe.methods.method import Method
from cae2pipe.methods.milan import MILAN
from cae2pipe.methods.mvp import MVP

Builder = Callable[[ModelSettings, int], Method]

METHODS: dict[str, Builder] = {
    "caev2": CAEv2,
    "cae": CAE,
    "mvp": MVP,
    "mae": MAE,
    "milan": MILAN,
    "fd": FeatureDistillation,
}
BUILT_IN = frozenset(METHODS)


def register(name: str, builder: Builder) -> None:
    """Register a method under a name. A method that was registered under it before is replaced.

    Raises:
        SettingsError: an empty name, that of a built-in method, or a builder that is not callable.
    """
    if not name or name in BUILT_IN:
        raise SettingsError(f"{name!r} is not free for your own method", where="method", fix="use another name")
    if not callable(builder):
        raise SettingsError(
            f"the builder of method {name!r} is not callable", where="method", fix="give a class or a function"
        )
    METHODS[name] = builder


def check_method(name: str) -> None:
    """Raise SettingsError for an unknown name."""
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1)
        raise SettingsError(
            f"unknown method {name!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
            where="method",
            fix=f"use one of {', '.join(METHODS)}",
        )


def build_method(name: str, settings: ModelSettings, target_dim: int, summary: int | None = None) -> Method:
    """The module of a method, freshly initialised from torch's global generator. ``summary``: its width, if it is a
    target.

    Raises:
        SettingsError: unknown method, or settings that do not fit it, or a summary, which it does not predict.
    """
    check_method(name)
    method = METHODS[name](settings, target_dim)
    if summary is not None:
        method.add_summary(settings, summary)
    return method
