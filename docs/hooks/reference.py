"""Reference pages that are made from the code: mkdocs calls ``on_page_markdown`` for each page that it builds.

A page says ``<!-- generated: NAME -->`` where the text belongs.
"""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

MARKED = re.compile(r"<!-- generated: ([\w-]+) -->")
WIDEST = 60
"""Characters of a default value that a table shows."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with its generated parts filled in."""
    return MARKED.sub(lambda match: GENERATED[match[1]](), markdown)


def cli() -> str:
    """Every command of the command line: usage, arguments, options."""
    import typer.main

    from cae2pipe.commands.app import app

    pairs = commands(typer.main.get_command(app))
    return "\n\n".join(section for path, command in pairs for section in describe(path, command))


def commands(command: Any, path: tuple[str, ...] = ("cae2pipe",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below one that are no groups, with their words."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def describe(path: tuple[str, ...], command: Any) -> Iterator[str]:
    """One command, as Markdown."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join((*path, *(metavar(p) for p in arguments), *(["[OPTIONS]"] if options else [])))
    yield f"## {' '.join(path[1:])}"
    yield unwrapped(command.help or "")
    yield f"```text\n{usage}\n```"
    if arguments:
        rows = [(code(metavar(p)), required(p), text(p.help or "")) for p in arguments]
        yield table(("argument", "default", "what"), rows)
    if options:
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        names = {p.name: ", ".join(p.opts + p.secondary_opts) + takes(p, hints[p.name]) for p in options}
        rows = [(code(names[p.name]), required(p), text(p.help or "")) for p in options]
        yield table(("option", "default", "what"), rows)
    if command.epilog:
        examples = "\n".join(line.removeprefix("Example: ") for line in command.epilog.split("\n\n"))
        yield f"```bash\n{examples}\n```"


def metavar(parameter: Any) -> str:
    """How usage lines name an argument."""
    return parameter.metavar or parameter.name.upper()


def takes(parameter: Any, annotation: Any) -> str:
    """What follows an option, by the annotation of the function's parameter."""
    if parameter.is_flag:
        return ""
    kinds = typing.get_args(annotation) or (annotation,)
    kind = next(kind for kind in kinds if kind is not type(None))
    kind = next(iter(typing.get_args(kind)), kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " " + "|".join(str(value.value) for value in kind)
    return " " + (parameter.metavar or {int: "N", float: "X", str: "TEXT"}.get(kind, "PATH"))


def required(parameter: Any) -> str:
    """A parameter's default, or that it has none."""
    if parameter.required:
        return "required"
    default = parameter.default
    if isinstance(default, str | int | Path) and default is not False:  # an Enum is text here
        return code(str(getattr(default, "value", default)))
    return ""


def settings() -> str:
    """Every setting of every stage, and what presets change."""
    from cae2pipe.config.base import preset_names
    from cae2pipe.config.dense import DENSE
    from cae2pipe.config.evaluate import EVALUATIONS
    from cae2pipe.config.stages import STAGES, settings_class

    evaluations = {**EVALUATIONS, **DENSE}
    sections = []
    for stage in STAGES:
        kinds = evaluations if stage == "evaluate" else {"": settings_class(stage, "")}
        for name, kind in kinds.items():
            presets = [p for p in preset_names(stage) if p.startswith(name)]
            title = f"{stage} {name}".rstrip()
            sections += [f"## {title}", unwrapped(kind.__doc__ or ""), *fields(kind, title)]
            if stage == "compare":
                sections += [f"### {title} presets", grids()]
            else:
                rows = [(code(preset), *changes(stage, preset)) for preset in presets]
                sections += [
                    f"### {title} presets",
                    table(("preset", "what", "extends", "changes"), rows),
                ]
    return "\n\n".join(sections)


def fields(kind: Any, title: str, prefix: str = "", section: Any = None) -> Iterator[str]:
    """A settings class: a table of its own fields, then its sections, each below a heading.

    ``section``: the section as the settings around it have it by default, which may differ from the class's own.
    """
    from cae2pipe.config.base import Settings

    rows, sections = [], []
    for name, info in kind.model_fields.items():
        inner = info.annotation
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        default = default if section is None else getattr(section, name)
        if isinstance(inner, type) and issubclass(inner, Settings):
            sections.append((name, inner, default))
            continue
        items = [item for item in typing.get_args(inner) if isinstance(item, type) and issubclass(item, Settings)]
        if typing.get_origin(inner) is tuple and items:
            sections.append((f"{name}[]", items[0], None))
        value = "required" if info.is_required() and section is None else code(shown(default))
        rows.append((code(prefix + name), text(kind_name(inner)), value, text(info.description or "")))
    if rows:
        yield table(("setting", "type", "default", "what"), rows)
    for name, inner, default in sections:
        yield f"### {title} {prefix}{name}"
        yield unwrapped(inner.__doc__ or "")
        yield from fields(inner, title, f"{prefix}{name}.", default)


def kind_name(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(code(str(value)) for value in arguments)
    if origin is typing.Annotated:
        return kind_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else kind_name(part) for part in arguments)
    if origin in (tuple, list):
        parts = [part for part in arguments if part is not Ellipsis]
        many = "" if origin is list or Ellipsis in arguments else f"{len(parts)} x "
        return f"list of {many}{kind_name(parts[0])}"
    if origin is dict:
        return "mapping"
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return names.get(annotation, {"Path": "path"}.get(annotation.__name__, "mapping"))


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    line = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return line if len(line) <= WIDEST else line[: WIDEST - 3] + "..."


def plain(value: Any) -> Any:
    """A value as YAML can write it, with numbers of few digits."""
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def changes(stage: str, preset: str) -> tuple[str, str, str]:
    """The comment at the top of a preset's file, what it extends, and the values in it; recipes apart."""
    from cae2pipe.config.base import package_folder
    from cae2pipe.config.yaml_core import read_yaml

    content = (package_folder("configs") / stage / f"{preset}.yaml").read_text(encoding="utf-8")
    about = " ".join(line.lstrip("# ") for line in re.match(r"(?:#.*\n)*", content)[0].splitlines())
    raw = read_yaml(content) or {}
    parent, recipes = raw.pop("extends", None), raw.pop("recipes", {})
    parts = [assignments(raw)]
    parts += [f"with {code(f'recipe={name}')}: {assignments(values)}" for name, values in recipes.items()]
    return text(about), code(parent) if parent else "", "; ".join(part for part in parts if part)


def assignments(values: dict[str, Any], prefix: str = "") -> str:
    """Nested values as ``a.b=c``."""
    parts = []
    for name, value in values.items():
        nested = isinstance(value, dict)
        parts.append(assignments(value, f"{prefix}{name}.") if nested else code(f"{prefix}{name}={shown(value)}"))
    return ", ".join(parts)


def grids() -> str:
    """The grids that come with the package."""
    from cae2pipe.config.base import load, preset_names
    from cae2pipe.config.compare import GridSettings, for_sets

    rows = []
    for name in preset_names("compare"):
        grid = load(GridSettings, "compare", name)
        several = any(variant.repeated for variant in grid.variants)
        runs = len(for_sets(grid, ("a", "b") if several else ("a",)).variants) * len(grid.seeds)
        told = f"{runs} on two target sets" if several else str(runs)
        rows.append((code(name), text(grid.title), told, ", ".join(code(scored.kind) for scored in grid.evaluate)))
    return table(("grid", "title", "runs", "scores"), rows)


def unwrapped(doc: str) -> str:
    """A docstring's paragraphs, each in one line."""
    return "\n\n".join(text(paragraph) for paragraph in re.split(r"\n\s*\n", doc.strip()))


def text(value: str) -> str:
    """Text for a table's cell: one line, and nothing taken for Markdown's own signs but backquotes."""
    parts = re.split(r"(`[^`]*`)", " ".join(value.split()))
    plain = [part if part.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts]
    return "".join(plain).replace("|", "\\|")


def code(value: str) -> str:
    """A code span in a table's cell."""
    return f"`{value}`".replace("|", "\\|") if value else ""


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def distil_resnet() -> str:
    """The example of a training loop that is not ours."""
    return f"```python\n{(Path(__file__).parents[1] / 'distil_resnet.py').read_text(encoding='utf-8')}```"


GENERATED: dict[str, Callable[[], str]] = {"cli": cli, "distil_resnet": distil_resnet, "settings": settings}
"""By the names that the pages' comments have."""
