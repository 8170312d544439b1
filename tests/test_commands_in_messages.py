"""Commands that messages propose can be pasted into a shell, whatever characters the paths have."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.errors import SettingsError, command
from cae2pipe.loading.joining import nothing_common
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import refuse_target_set
from cae2pipe.stages.verify import verify
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.labels import spelling

ROOT = Path(__file__).parents[1] / "cae2pipe"
SOURCES = sorted(path for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern))
"""Not by rglob, which does not enter the link to the stages."""
COMMANDS = "|".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
UNQUOTED = re.compile(rf"cae2pipe (?:{COMMANDS})\b[^`\n]*? \{{\}}")
"""A command in an f-string, one of whose arguments is a value."""


def parts(node: ast.JoinedStr) -> str:
    """The text of an f-string, with {} in place of its values."""
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


@pytest.fixture
def copy(target_root, tmp_path) -> Path:
    return shutil.copytree(target_root, tmp_path / "it's my $set")


def proposed(fix: str | None) -> list[str]:
    """The arguments of the command in a fix, as a shell parses them."""
    assert fix
    quoted = re.search(r"`(cae2pipe .*?)`", fix)
    words = shlex.split(quoted[1] if quoted else fix[fix.index("cae2pipe ") :])
    assert words[0] == "cae2pipe"
    return words[1:]


def test_no_message_puts_a_value_into_a_command_unquoted():
    assert ROOT / "stages" / "verify.py" in SOURCES
    found = [
        f"{path.name}:{node.lineno}: {text}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) and (text := parts(node)) and UNQUOTED.search(text)
    ]
    assert found == [], "use errors.command(...)"


def test_the_search_for_unquoted_values_finds_them():
    node = ast.parse('f"cae2pipe verify {root} --repair"', mode="eval").body
    assert isinstance(node, ast.JoinedStr)
    assert UNQUOTED.search(parts(node))
    assert not UNQUOTED.search("`cae2pipe {}` with the same arguments; made by cae2pipe {}.")


@pytest.mark.parametrize("path", ["plain", "two words", "it's", "$HOME", "a;b", "per%20cent", "ünïcode"])
def test_a_shell_reads_the_arguments_back(path):
    assert shlex.split(command("verify", Path(path), "--repair")) == ["cae2pipe", "verify", path, "--repair"]


def test_the_proposed_repair_repairs(copy, teacher_file):
    next(copy.glob("codec.zarr/patches/basis/c/0/0")).write_bytes(b"x")
    words = proposed(verify(copy, Silent()).problems[0].fix)
    again = CliRunner().invoke(app, [*words, "--teacher-weights", str(teacher_file), "--device", "cpu"])
    assert again.exit_code == 0, again.output
    assert verify(copy, Silent()).problems == []


def test_commands_with_several_sets_are_quoted(copy):
    fix = str(nothing_common(TargetSet(copy), TargetSet(copy)).fix)
    teacher = spelling(TargetSet(copy).artifact.identity)
    assert proposed(fix) == ["extract-targets", str(copy), "OUT", "--teacher", teacher]
    with pytest.raises(SettingsError, match="the folder of the run is missing") as caught:
        refuse_target_set(copy, [copy])
    assert proposed(caught.value.fix) == ["pretrain", str(copy), str(copy), "RUN"]
