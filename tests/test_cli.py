"""The command line itself: parsing, exit codes, messages. The commands' work is tested with the stages."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer
import typer.main
from rich.text import Text
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.commands.shared import exits
from cae2pipe.errors import DivergedError, Terminated
from cae2pipe.runtime.terminal import Terminal, print_table
from tests.conftest import write_photos

runner = CliRunner()


def run(*arguments: object):
    return runner.invoke(app, [str(argument) for argument in arguments])


def test_version_and_help():
    from cae2pipe.version import __version__

    assert run("--version").output.strip() == __version__
    out = run("--help").output
    for command in (
        "shard",
        "extract-targets",
        "pretrain",
        "evaluate",
        "inspect",
        "verify",
        "demo",
        "config",
        "teachers",
    ):
        assert command in out


@pytest.mark.parametrize(
    "command", ["shard", "extract-targets", "pretrain", "inspect", "verify", "demo", "evaluate knn", "evaluate linear"]
)
def test_every_command_has_help(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert result.output.rstrip().splitlines()[-1].startswith(f" Example: cae2pipe {command} ")


def test_help_gives_the_defaults_of_the_settings():
    from cae2pipe.config.extract import CodecSettings, ExtractSettings

    views, fidelity = ExtractSettings.model_fields["views"].default, CodecSettings().fidelity
    for command, text in (("extract-targets", f"(default: {views})"), ("recode", f"(default: {fidelity})")):
        result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
        assert text in " ".join(result.output.replace("│", " ").split())


def commands(group: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and group."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *path, name)


def test_no_help_imports_anything_heavy():
    code = f"""
import contextlib, io, sys
from cae2pipe.cli import app
for path in {list(commands(typer.main.get_command(app)))}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        app([*path, "--help"])
heavy = set("torch torchvision timm open_clip zarr numpy PIL webdataset matplotlib".split()) & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


TORCHVISION_OF_ANOTHER_TORCH = """
import torch

load = torch.ops.load_library

def refuse(path):
    if "torchvision" in str(path):
        raise OSError("undefined symbol: _ZN3c10")
    load(path)

torch.ops.load_library = refuse
"""
"""torchvision ignores that its library cannot be loaded, and fails when it uses the operators."""


def failed_import(breaks: str, *arguments: object) -> str:
    """What a command prints, in an interpreter in which ``breaks`` was run first."""
    words = ["cae2pipe", *map(str, arguments)]
    code = f"{breaks}\nimport sys\nfrom cae2pipe.cli import main\nsys.argv = {words}\nmain()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_torchvision_of_another_torch_is_named_with_the_command_that_replaces_it(photos, tmp_path):
    import torch

    said = failed_import(TORCHVISION_OF_ANOTHER_TORCH, "extract-targets", photos, tmp_path / "set", "--workers", 0)
    assert f"torch {torch.__version__} and torchvision {version('torchvision')} do not belong together: " in said
    assert f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]} torchvision" in said


def test_operators_that_torchvision_lacks_only_when_used_are_explained_too(capsys):
    import torch

    with pytest.raises(typer.Exit) as caught, exits():
        torch.ops.torchvision.no_such_operator  # noqa: B018
    assert caught.value.exit_code == 2
    assert "do not belong together" in capsys.readouterr().err


def test_a_package_that_cannot_load_its_libraries_is_named(photos, tmp_path):
    breaks = """
import ctypes

load = ctypes.CDLL.__init__

def refuse(self, name, *rest, **named):
    if "torch" in str(name):
        raise OSError("libcudart.so.13: cannot open shared object file: No such file or directory")
    load(self, name, *rest, **named)

ctypes.CDLL.__init__ = refuse
"""
    said = failed_import(breaks, "extract-targets", photos, tmp_path / "set", "--workers", 0)
    assert f"torch {version('torch')} cannot be imported: OSError: libcudart.so.13: cannot open shared" in said
    assert "pip install --force-reinstall torch" in said


def test_a_dependency_that_is_not_installed_is_named(photos, tmp_path):
    breaks = "import sys\nsys.modules['yaml'] = None"
    assert "error: yaml is not installed" in failed_import(breaks, "config", "show", "pretrain", "base")


def test_memory_that_ends_anywhere_is_no_traceback(capsys):
    import torch

    with pytest.raises(typer.Exit) as caught, exits():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    assert caught.value.exit_code == 1
    said = capsys.readouterr().err
    assert "the device has run out of memory: CUDA out of memory. Tried to allocate 2.00 GiB." in said
    assert "--device" in said
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        with pytest.raises(typer.Exit) as caught, exits():
            raise error
        assert caught.value.exit_code == 1
        assert "fewer --workers" in capsys.readouterr().err
    with pytest.raises(typer.Exit) as caught, exits():
        torch.empty(10**15)
    assert "this machine has run out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a defect"), exits():
        raise RuntimeError("a defect")


def test_fetching_says_what_it_waits_for():
    result = run("teachers", "fetch", "lite0")
    assert result.stdout.endswith(".pth\n")
    assert "looking for the weights of lite0 in the local cache, then on the hub" in result.stderr


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "cae2pipe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_config_show_resolves_presets_recipes_and_overrides():
    out = run("config", "show", "pretrain", "tiny", "--set", "recipe=official", "--set", "epochs=17").output
    assert "epochs: 17" in out
    assert "beta2: 0.999" in out
    assert "# Passes over the data." in out
    assert "base" in run("config", "list").output


ROWS = [{"name": "a-name-without-any-blank-" * 3, "note": "words " * 12, "n": 1}, {"name": "b", "note": "x", "n": 20}]


def table(columns: str | None, monkeypatch, **options: Any) -> list[str]:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    file = io.StringIO()
    print_table(Terminal(file=file, **options), ROWS)
    return [Text.from_ansi(line).plain for line in file.getvalue().splitlines()]


def test_tables_are_one_line_per_row_in_a_pipe_and_folded_to_a_width_that_is_known(monkeypatch):
    lines = table(None, monkeypatch)
    assert [line.split() for line in lines] == [
        ["name", "note", "n"], [ROWS[0]["name"], *["words"] * 12, "1"], ["b", "x", "20"],
    ]  # fmt: skip
    for columns, options in (("60", {}), (None, {"force_terminal": True, "width": 60})):
        folded = table(columns, monkeypatch, **options)
        assert len(folded) > 3
        assert max(map(len, folded)) <= 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("config", "show", "pretrain", "bse"), "nearest: 'base'"),
        (("config", "show", "pretrian", "base"), "nearest: 'pretrain'"),
        (("config", "show", "pretrain", "base", "--set", "mask.ration=0.4"), "did you mean 'mask.ratio'?"),
        (("config", "show", "pretrain", "base", "--set", "mask.ratio=1"), "mask.ratio"),
        (("config", "show", "pretrain", "base", "--set", "data.streams=63"), "data.streams"),
        (("inspect", "nowhere"), "no such folder"),
        (("shard", "nowhere", "out"), "nowhere"),
        (("pretrain", "nowhere", "out"), "no such folder"),
        (("extract-targets", "nowhere", "out", "--config", "clip-b61"), "nearest: 'clip-b16'"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_bad_usage_ends_with_2():
    assert run("pretrain").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("extract-targets", "a", "b", "--codec", "zip").exit_code == 2


def test_a_missing_weights_file(photos, tmp_path):
    result = run(
        "extract-targets", photos, tmp_path / "out", "--config", "vit-tiny-in21k",
        "--set", f"teacher.weights={tmp_path / 'none.safetensors'}", "--workers", 0,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "none.safetensors" in result.stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143), (DivergedError("x"), 1)])
def test_exit_codes(error, code):
    with pytest.raises(typer.Exit) as caught, exits():
        raise error
    assert caught.value.exit_code == code


def test_shard_inspect_verify(tmp_path):
    write_photos(tmp_path / "images", classes=2, each=3)
    assert run("shard", tmp_path / "images", tmp_path / "out", "--workers", 0).exit_code == 0
    facts = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert (facts["kind"], facts["images"], facts["classes"]) == ("shards", 6, 2)
    assert run("verify", tmp_path / "out").exit_code == 0
    tar = tmp_path / "out" / "tars" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    result = run("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "000000.tar" in result.output + result.stderr


@pytest.mark.parametrize("command", ["config show pretrain base", "inspect SET --json", "verify SET", "--help"])
def test_a_reader_that_has_gone_has_seen_enough(command, target_root):
    """As in ``cae2pipe config list | head -1``: commands end quietly, and with the code of a failure."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cae2pipe", *command.replace("SET", str(target_root / "shards")).split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("verify: ")] == []


def test_a_target_set_without_a_run_misses_the_run(target_root, tmp_path):
    wide = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
    for words in ([target_root], [target_root, "--config", "small"]):
        result = runner.invoke(app, ["pretrain", *map(str, words)], env=wide)
        assert result.exit_code == 2
        assert f"the folder of the run is missing: cae2pipe pretrain {target_root} RUN" in result.output
    result = runner.invoke(app, ["pretrain", str(tmp_path / "run")], env=wide)
    assert result.exit_code == 2
    assert "Missing argument 'TARGETS..." in result.output
