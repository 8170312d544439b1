"""Errors of the operating system end a command with a message, never a traceback. All are real: files that are folders,
limits, full disks, closed streams."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from cae2pipe.artifacts.tensors import write_safetensors, write_torch
from cae2pipe.cli import app
from cae2pipe.commands import shared
from cae2pipe.commands.jobs import _end, failure
from cae2pipe.commands.shared import exits
from cae2pipe.errors import BadInputError, Cae2pipeError
from cae2pipe.runtime.foreign_names import why_not_utf8
from cae2pipe.runtime.system_errors import explain_system_error
from tests.faults.short_of_memory import limited

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts background jobs with SIGINT ignored, which the processes of these tests would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("folder", 2, "Is a directory"),
        ("file/below", 2, "Not a directory"),
        ("loop", 2, "Too many levels of symbolic links"),
        ("x" * 300, 2, "File name too long"),
        ("nul\0", 2, "NUL character"),
        ("nowhere", 2, "No such file"),
    ],
)
def test_a_path_that_cannot_be_read_is_a_message(name, code, said, odd, capsys):
    with pytest.raises(typer.Exit) as caught, exits():
        (odd / name).read_bytes()
    assert caught.value.exit_code == code
    assert said in (shown := capsys.readouterr().err)
    assert "fix:" in shown
    assert "\0" in name or str(odd / name) in shown


def test_a_path_that_cannot_be_resolved_is_a_message(odd):
    with pytest.raises((OSError, RuntimeError)) as caught:
        (odd / "loop").resolve(strict=True)
    assert explain_system_error(caught.value).where == str(odd / "loop")


def test_an_error_without_a_number_is_a_defect():
    with pytest.raises(OSError, match="a defect"), exits():
        raise OSError("a defect")


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_tensors_that_cannot_be_written_are_the_operating_systems_error(write, tmp_path):
    path = tmp_path / "tensors"
    write(path, {"a": torch.zeros(10)})
    before = path.read_bytes()
    for count in (3000, 200_000):  # within what is buffered, and beyond
        with limited(resource.RLIMIT_FSIZE, 2000), pytest.raises(OSError, match="too large") as caught:
            write(path, {"a": torch.zeros(count)})
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_tensors_may_be_read_as_the_umask_says(exported):
    assert stat.S_IMODE((exported / "encoder.safetensors").stat().st_mode) == stat.S_IMODE(
        (exported / "config.json").stat().st_mode
    )


OUTS = [
    "shard images",
    "extract-targets images",
    "recode set",
    "copy set",
    "pretrain set",
    "compare table1 set images",
    "export run",
    "evaluate knn run images",
    "evaluate linear run images",
    "evaluate attentive run images",
    "evaluate finetune run images",
    "evaluate segment run images",
    "evaluate detect run images",
    "report run --out",
    "demo",
]


@pytest.mark.parametrize(("command", "name"), list(zip(OUTS, cycle(["", "r\udcff"]), strict=False)))
def test_an_output_folder_without_a_usable_name_is_refused_at_the_start(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command.split(), name])
    assert result.exit_code == 2
    said = "not valid UTF-8" if name else "this name is empty"
    assert said in " ".join(result.output.replace("│", "").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["inspect", "verify", "shard", "extract-targets", "copy"])
def test_a_source_without_a_name_is_not_the_current_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if command in ("inspect", "verify") else ["out"]
    result = CliRunner().invoke(app, [command, "", *out])
    assert result.exit_code == 2, result.output
    assert "this name is empty" in " ".join(result.output.replace("│", "").split())
    assert not list(tmp_path.iterdir())


def test_commands_with_a_folder_of_their_own_need_no_out(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["report", str(trained_run())], catch_exceptions=False).exit_code == 0
    assert (tmp_path / "report" / "report.html").is_file()
    refused = CliRunner().invoke(app, ["demo", "--teacher", "nobody"], catch_exceptions=False)
    assert refused.exit_code == 2
    assert "nobody" in refused.output


def test_the_locale_is_named_where_it_is_the_reason():
    # As Python reads UTF-8 where the encoding is ASCII.
    what, fix = why_not_utf8("d\udcc3\udca9")
    assert r"cannot read the name 'd\xe9'" in what
    assert "LC_ALL" in fix


def run(code: str, *arguments: str, redirect: str = "", **options: object) -> subprocess.CompletedProcess:
    """Python code in a process, followed by its arguments and redirections of a shell."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, **options)


MAIN = "from cae2pipe.cli import main\nmain()"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("arguments", "redirect", "code", "said"),
    [
        (["--version"], ">/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        (["--version"], ">&-", 0, ""),
        (["--version"], "2>&-", 0, ""),
        (["inspect", "nowhere"], "2>&-", 2, ""),
        (["inspect", "nowhere"], "2>/dev/full", 2, ""),
        (["config", "list"], ">/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
    ],
)
def test_streams_that_cannot_be_written(arguments, redirect, code, said):
    done = run(MAIN, *arguments, redirect=redirect)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_closed_stream_is_never_a_file_of_ours(tmp_path):
    code = f"""
import os, sys
from cae2pipe.runtime.streams import prepare_streams
prepare_streams()
file = open({str(tmp_path / "data")!r}, "w")
os.write(2, b"what a library prints")
sys.exit(file.fileno() < 3 or os.path.getsize(file.name))
"""
    assert run(code, redirect="2>&- >&-").returncode == 0


def test_names_that_a_stream_cannot_print_are_escaped(tmp_path):
    code = f"import os\nos.chdir({str(tmp_path)!r})\n"
    code += "from cae2pipe.runtime.streams import prepare_streams\nprepare_streams()\n"
    code += "from cae2pipe.commands.shared import console\nconsole.print('d\\xe9 \\udcff', markup=False)"
    done = run(code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "d\\xe9 \\udcff\n")


@pytest.mark.parametrize("module", ["typer", "rich.console", "cae2pipe.commands.training", "typer.rich_utils"])
def test_ctrl_c_while_modules_are_imported(module):
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""
    done = run(code + MAIN, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_three_ctrl_c_in_a_row_are_one(monkeypatch):
    said = []

    def show(text: str) -> None:
        said.append(text)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(shared.errors, "print", show)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as caught, exits():
        signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is handler


class Patient:
    """A process that ends after three signals."""

    asked = 0

    def terminate(self) -> None:
        self.asked += 1

    def join(self) -> None:
        if self.asked < 3:
            signal.raise_signal(signal.SIGINT)


def test_every_further_ctrl_c_is_passed_on_to_the_jobs():
    process = Patient()
    _end([process])  # type: ignore[list-item]
    assert process.asked == 3


def test_a_job_that_was_killed_is_said_to_be():
    one, two = failure([0, -signal.SIGKILL]), failure([2, -signal.SIGTERM, 1])
    assert one.what == "1 of 2 processes failed: 2 (killed by SIGKILL)"
    assert "errors above" not in str(one.fix)
    assert "fewer --jobs" in str(one.fix)
    assert two.what == "3 of 3 processes failed: 1, 2 (killed by SIGTERM), 3"
    assert "errors above" in str(two.fix)
    assert (type(failure([2, 0])), type(one)) == (BadInputError, Cae2pipeError)


SMALL_MACHINE = """
import sys, yaml
from pathlib import Path

import typer

from cae2pipe.commands.shared import exits
from cae2pipe.config.base import build, merge
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain

if __name__ == "__main__":
    targets, disk, raw = Path(sys.argv[1]), Path(sys.argv[2]), yaml.safe_load(sys.argv[3])
    often = {"epochs": 9, "speed": {"checkpoint_minutes": 1e-9}}
    for name, over in (("shm", {"speed": {"workers": 2}}), ("full", often)):
        try:
            with exits():
                pretrain(targets, disk / name, build(PretrainSettings, merge(raw, over), "test"), report=Silent())
        except typer.Exit as left:
            print(name, "left with", left.exit_code, file=sys.stderr, flush=True)
    print(*sorted(path.name for path in (disk / "full/checkpoints").iterdir()))
    from cae2pipe.training.checkpoint import checkpoints, read_checkpoint, step_of
    newest = step_of(checkpoints(disk / "full/checkpoints")[-1])
    print(read_checkpoint(disk / "full/checkpoints", newest)["step"])
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root can mount")
def test_a_small_dev_shm_and_a_full_disk(target_root, pretrain_settings, tmp_path):
    raw = pretrain_settings(speed={"keep": 9}).model_dump_json()
    (tmp_path / "script.py").write_text(SMALL_MACHINE)
    (tmp_path / "disk").mkdir()
    given = [sys.executable, tmp_path / "script.py", target_root, tmp_path / "disk", raw]
    mounts = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && mount -t tmpfs -o size=1m tmpfs {tmp_path / 'disk'}"
    command = ["unshare", "-m", "sh", "-c", f'{mounts} || exit 77; exec "$@"', "sh", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    if done.returncode == 77:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 0, done.stderr
    shm, full = done.stderr.split("shm left with 1\n")
    assert "/dev/shm" in shm
    assert "docker run --shm-size" in shm
    assert full.startswith("error: the disk is full: No space left on device\n  where: ")
    # After it, Python's resource tracker may report a semaphore of the killed workers.
    assert "\nfull left with 1\n" in full
    assert "Traceback" not in done.stderr
    # The last checkpoint is complete, and there are no partial files.
    names, step = done.stdout.splitlines()
    assert names.split()[-1] == f"step-{int(step):08d}.pt"
