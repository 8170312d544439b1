"""Arguments of the Python API are checked against their annotations, so that a mistake names the argument."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from cae2pipe.artifacts.storage import is_remote
from cae2pipe.errors import SettingsError

P = ParamSpec("P")
R = TypeVar("R")

NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}
"""What is taken as an int or a float; also numbers of numpy."""
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a str",
    bool: "True or False",
    type(None): "None",
    Path: "a path",
    os.PathLike: "a path",
    Mapping: "a mapping",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which first checks its arguments against their annotations.

    A path is a ``str``, or anything that ``os.fspath`` or fsspec takes as one. Protocols must be ``runtime_checkable``.

    Raises:
        SettingsError: an argument is of another type; it names the argument.
    """
    signature = inspect.signature(function)
    # Later than here: annotations may name what the module defines below.
    hints = functools.cache(lambda: get_type_hints(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            annotation = hints().get(name, Any)
            if not fits(value, annotation):
                owner = function.__qualname__.removesuffix(".__init__")
                what = f"{name}={value!r:.80} is not {described(annotation)}"
                raise SettingsError(what, where=owner, fix=f"correct the argument {name}")
        return function(*args, **kwargs)

    return call


def fits(value: object, annotation: Any) -> bool:
    """Whether a value has the type of an annotation. Of collections only the items of lists and tuples are checked."""
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Any:
        return True
    if kind is Literal:
        return value in parts
    if kind in (Path, os.PathLike):
        return isinstance(value, os.PathLike) or is_remote(value)
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
    if not isinstance(value, kind):
        return False
    return not isinstance(value, list | tuple) or all(fits(item, parts[0]) for item in value)


def described(annotation: Any) -> str:
    """An annotation in words."""
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        *words, last = dict.fromkeys(described(part) for part in parts)
        return f"{', '.join(words)} or {last}" if words else last
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (Sequence, Iterable):
        return f"a list ({described(parts[0])} each)"
    return WORDS.get(kind) or f"a {kind.__name__}"
