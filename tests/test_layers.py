"""Import rules: packages import only lower layers, and there are no import cycles.

Imports inside functions count, and so do modules named in strings, such as those that workers preload.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    "__init__ __main__",
    "cli",
    "commands",
    "demo",
    "api",
    "stages",
    "evaluation dense",
    "reporting supervised",
    "comparison",
    "training",
    "loading",
    "targets",
    "shards teachers methods",
    "models",
    "images",
    "config",
    "artifacts",
    "runtime",
    "errors version",
)
"""Packages and files of ``cae2pipe/``, the highest layer first. Those of one layer do not import each other."""
HEIGHT = {name: -number for number, layer in enumerate(LAYERS) for name in layer.split()}


def module_name(path: Path) -> str:
    """``cae2pipe.stages.export`` of the file's path below ``ROOT``; a package is named by its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for pattern in ("*.py", "*/*.py") for path in (ROOT / "cae2pipe").glob(pattern)}


def imported(code: str) -> Iterator[tuple[int, str]]:
    """Lines and full names of everything imported from ``cae2pipe``, or named as its module in a string."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: a relative import, which nothing here follows")
            case ast.Constant(value=str() as text) if re.fullmatch(r"cae2pipe(\.\w+)+", text):
                assert text in MODULES, f"line {node.lineno}: there is no module {text}"
                names = [text]
            case _:
                continue
        yield from ((node.lineno, name) for name in names if name.startswith("cae2pipe."))


def module_of(name: str) -> str:
    """The module that an imported name is or comes from."""
    while name not in MODULES and f"{name}.__init__" not in MODULES:
        name = name.rpartition(".")[0]
    return name if name in MODULES else f"{name}.__init__"


def upward(module: str, code: str) -> list[str]:
    """A module's imports from packages that are not below its own."""
    own = module.split(".")[1]
    imports = ((line, name, module_of(name).split(".")[1]) for line, name in imported(code))
    return [
        f"{module}, line {line}: {name}"
        for line, name, other in imports
        if other != own and HEIGHT[other] >= HEIGHT[own]
    ]


def test_every_package_has_its_layer():
    assert sorted(name for layer in LAYERS for name in layer.split()) == sorted(
        {name.split(".")[1] for name in MODULES}
    )


def test_packages_import_what_is_below_them():
    lines = [line for module, path in MODULES.items() for line in upward(module, path.read_text())]
    assert not lines, "\n".join(lines)


RUN_BY = {
    "add_teacher": {"extract_targets"},
    "compare": {"evaluate", "evaluate_zeroshot", "pretrain", "recode", "report"},
    "repair": {"extract_targets", "recode"},
}
"""Stages that other stages run. Code shared by stages belongs below ``stages``."""


def test_no_stage_imports_another_that_it_does_not_run():
    stages = "cae2pipe.stages"
    imports = {
        module.rpartition(".")[2]: {
            module_of(name).rpartition(".")[2]
            for _, name in imported(path.read_text())
            if name.startswith(f"{stages}.")
        }
        for module, path in MODULES.items()
        if module.startswith(f"{stages}.")
    }
    assert {stage: others for stage, others in imports.items() if others} == RUN_BY


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: {module_of(name) for _, name in imported(path.read_text())} - {module}
        for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize(
    "code",
    [
        "from cae2pipe.stages.pretrain import pretrain",
        "import cae2pipe.stages.pretrain as stage",
        "from cae2pipe import stages",
        "from cae2pipe.loading import batches",
        "def late():\n    from cae2pipe.evaluation.knn import neighbours",
        "if TYPE_CHECKING:\n    from cae2pipe.training.step import Step",
        "PRELOAD = ['cae2pipe.loading.batches']",
    ],
)
def test_an_import_of_what_is_above_is_found(code):
    assert len(upward("cae2pipe.targets.store", code)) == 1
    assert upward("cae2pipe.cli", code) == []
