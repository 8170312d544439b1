"""Commands on damaged folders. Allowed outcomes: a clear error, or exactly the result for undamaged folders."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import contents
from tests.ranks import imported

SECONDS = 60
"""Seconds after which a command counts as hanging: a hundred times its usual time."""
MEMORY = 6 * 2**30
"""Bytes of memory that a command may allocate."""


@dataclass(frozen=True)
class Command:
    """A command line in the world's folder, and its expected results as comparable values. ``out`` is the folder that
    it may write; ``before`` prepares the world."""

    line: str
    product: Callable[[Path, str], Any] = field(default=lambda world, stdout: None)
    out: str = "new"
    before: Callable[[Path], None] = field(default=lambda world: None)


@dataclass(frozen=True)
class Outcome:
    """``code`` is negative if a signal ended the process."""

    code: int | None
    stdout: str
    stderr: str
    product: Any


def encoder(world: Path, stdout: str) -> Any:
    return (world / "new" / "encoder.safetensors").read_bytes()


def begun(world: Path, stdout: str) -> Any:
    return (world / "begun" / "encoder.safetensors").read_bytes()


def data(folder: str) -> Callable[[Path, str], Any]:
    """All files of a folder except its manifest, which also records its inputs."""
    return lambda world, stdout: {
        name: content for name, content in contents(world / folder).items() if name.endswith((".tar", "/0", "/0/0"))
    }


def sound(kind: str) -> Callable[[Path, str], Any]:
    """Everything that ``verify`` has accepted: JSON by value."""

    def product(world: Path, stdout: str) -> Any:
        files = contents(world / kind)
        return {
            name: json.loads(content) if name.endswith(".json") else content
            for name, content in files.items()
            # Files that are not results of a run have no digest.
            if not name.startswith(("checkpoints/", "metrics.jsonl"))
        }

    return product


def score(kind: str) -> Callable[[Path, str], Any]:
    def product(world: Path, stdout: str) -> Any:
        result = json.loads((world / "scores" / kind / "result.json").read_text())
        return {name: value for name, value in result.items() if "top" in name or name == "scores"}

    return product


def fresh_score(world: Path, stdout: str) -> Any:
    result = json.loads((world / "new" / "knn" / "result.json").read_text())
    return {name: value for name, value in result.items() if "top" in name or name == "scores"}


def remove_linear(world: Path) -> None:
    shutil.rmtree(world / "scores" / "linear", ignore_errors=True)


PRETRAIN = "--config pretrain.yaml"
EXTRACT = "--config extract.yaml"
KNN = "--set k=[5] --workers 0 --device cpu"
LINEAR = "--fast --set epochs=2 --set warmup_epochs=1 --workers 0 --device cpu"

COMMANDS: Mapping[str, tuple[Command, ...]] = {
    "shards": (
        Command("inspect shards"),
        Command("verify shards", sound("shards")),
        Command("copy shards new", data("new")),
        Command(f"extract-targets shards new {EXTRACT}", data("new")),
        Command("shard images/train shards --workers 0 --set samples=20", out="shards"),
    ),
    "targets": (
        Command("inspect targets"),
        Command("verify targets", sound("targets")),
        Command(f"pretrain targets new {PRETRAIN}", encoder),
        Command(f"extract-targets shards targets {EXTRACT}", out="targets"),
        Command("recode targets new --codec int8 --lossy-source --workers 1", data("new")),
        Command("copy targets new", data("new")),
    ),
    "stored": (
        Command("inspect stored --json"),
        Command("verify stored", sound("stored")),
        Command(f"pretrain stored new {PRETRAIN}", encoder),
        Command("recode stored new --codec fp16 --workers 1", data("new")),
    ),
    "run": (
        Command("inspect run"),
        Command("verify run", sound("run")),
        Command(f"pretrain targets run {PRETRAIN}", out="run"),
        Command(f"evaluate knn run images new {KNN}", fresh_score),
        Command("export run new --format timm", lambda world, _: (world / "new" / "model.safetensors").read_bytes()),
        Command("report run --out new"),
    ),
    "begun": (
        Command("inspect begun"),
        Command(f"pretrain targets begun {PRETRAIN}", begun, "begun"),
    ),
    "scores": (
        Command("results scores"),
        Command("verify scores/knn", sound("scores/knn")),
        Command(f"evaluate knn run images scores {KNN}", score("knn"), "scores"),
        Command(f"evaluate linear run images scores {LINEAR}", score("linear"), "scores", remove_linear),
        Command("report run --scores scores --out new"),
    ),
}
"""By the folder that is damaged."""


def make_world(world: Path, images: Path, extract: dict[str, Any], pretrain: dict[str, Any]) -> None:
    """Every kind of folder, each made by its command, and unrelated files."""
    world.mkdir()
    shutil.copytree(images, world / "images")
    for name, settings in (("extract", extract), ("pretrain", pretrain)):
        (world / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    for number in range(2):
        folder = world / ("precious", "victim.zarr")[number]
        folder.mkdir()
        (folder / "thesis.txt").write_text("three years")
    for line in (
        "shard images/train shards --workers 0 --set samples=20",
        f"extract-targets shards targets {EXTRACT}",
        f"extract-targets shards stored {EXTRACT} --codec fp16 --set view.pixels=stored",
        f"pretrain targets run {PRETRAIN}",
        f"pretrain targets begun {PRETRAIN} --set stop_after=3 --set speed.checkpoint_minutes=1e-9",
        f"evaluate knn run images scores {KNN}",
        f"evaluate linear run images scores {LINEAR}",
    ):
        done = run(Command(line), world)
        assert done.code == 0, f"{line}: {done.stderr}"


def run(command: Command, world: Path) -> Outcome:
    """Run a command in a process of its own that has everything imported."""
    process = imported().Process(target=_run, args=(command.line.split(), world))
    process.start()
    process.join()
    streams = [world.with_name(f"{world.name}.{name}").read_text(errors="replace") for name in ("out", "err")]
    product = command.product(world, streams[0]) if process.exitcode == 0 else None
    return Outcome(process.exitcode, *streams, product)


def _run(arguments: list[str], world: Path) -> None:
    from cae2pipe.cli import main

    for number, name in ((1, "out"), (2, "err")):
        with world.with_name(f"{world.name}.{name}").open("w") as file:
            os.dup2(file.fileno(), number)
    os.chdir(world)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.argv = ["cae2pipe", *arguments]
    main()


def faults(command: Command, right: Outcome, outcome: Outcome) -> list[str]:
    """The error in an outcome, given ``right``, that of the undamaged world; None if it is allowed."""
    wrong = []
    if outcome.code not in (0, 1, 2):
        wrong.append("hung" if outcome.code == -signal.SIGALRM else f"exit code {outcome.code}")
    if "Traceback" in outcome.stderr or "Traceback" in outcome.stdout:
        wrong.append("traceback")
    if outcome.code in (1, 2) and not (outcome.stdout + outcome.stderr).strip():
        wrong.append("failed without a word")
    if "\x1b" in outcome.stdout + outcome.stderr:
        wrong.append("an escape sequence of a file reached the terminal")
    if outcome.code == 0 and outcome.product != right.product:
        wrong.append("another result, and exit code 0")
    return wrong


def bystanders(world: Path, damaged: str, command: Command) -> dict[str, bytes]:
    """Files that neither the damage nor the command may touch."""
    files = contents(world).items()
    return {name: content for name, content in files if name.split("/")[0] not in (damaged, command.out)}
