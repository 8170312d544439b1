"""YAML 1.2 (core schema): ``yes``, ``on``, ``1:30`` and dates are text, ``1e5`` is a number.

PyYAML reads version 1.1, where ``epochs: 1:30`` is 90 and ``epochs: yes`` is 1; of two equal keys it uses the last.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST, DEEPEST = 10_000, 50
"""Limits of a document: number of values, with repeated references counted each time, and nesting depth."""


class CoreLoader(yaml.SafeLoader):
    """Scalars of the core schema; no duplicate keys, merge keys or recursive values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [name for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        seen: set[str] = set()
        for name in names:
            if name.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name.value!r}", problem_mark=name.start_mark)
            seen.add(name.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def flatten_mapping(self, node: Any) -> None:
        """Merge keys are not part of the core schema."""


def _integer(loader: CoreLoader, node: Any) -> int:
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


def _number(loader: CoreLoader, node: Any) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


for kind, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", _integer)
CoreLoader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: not YAML, a duplicate key, nested too deeply, too large, or a number with too many digits. The
            message says where.
    """
    try:
        loader = CoreLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _count(node: Any, above: tuple[int, ...] = ()) -> int:
    """Number of values in a node, with repeated references counted each time."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= char <= "\udfff" for char in node.value):
            raise yaml.MarkedYAMLError(problem="half of a surrogate pair", problem_mark=node.start_mark)
        return 1
    if len(above) >= DEEPEST:
        raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=node.start_mark)
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    total = 1
    for part in parts:
        total += _count(part, (*above, id(node)))
        if total > LARGEST:
            raise yaml.MarkedYAMLError(problem=f"more than {LARGEST} values", problem_mark=node.start_mark)
    return total
