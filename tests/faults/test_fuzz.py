"""One random file of a folder is changed: every command then gives the same result as for the undamaged folder, or a
clear error. ``make fuzz N=500`` tries more than ``make test``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_photos
from tests.faults.fuzzed import COMMANDS, Command, Outcome, bystanders, faults, make_world, run
from tests.faults.mutations import mutate

CASES = int(os.environ.get("CAE2PIPE_FUZZ", "60"))
"""Damages tried, over all kinds of folders."""
MOST = None if "CAE2PIPE_FUZZ" in os.environ else 1
"""Commands tried on each; None: all."""
FIRST = int(os.environ.get("CAE2PIPE_FUZZ_FIRST", "0"))
"""Number of the first damage: to reproduce a failure, set its number here, with one case."""


@pytest.fixture(scope="module")
def world(tmp_path_factory, extract_settings, pretrain_settings) -> Path:
    images = tmp_path_factory.mktemp("images")
    for number, part in enumerate(("train", "val")):
        write_photos(images / part, classes=2, each=20 - 10 * number, seed=number)
    root = tmp_path_factory.mktemp("fuzz") / "world"
    views = {"shard": {"samples": 20}, "codec": {"calibration": 64}}
    make_world(root, images, raw(extract_settings(**views)), raw(pretrain_settings(data={"batch": 16})))
    return root


def raw(settings) -> dict:
    return settings.model_dump(mode="json")


@pytest.fixture(scope="module")
def right(world) -> Callable[[Command], Outcome]:
    """The outcome of a command on undamaged folders."""

    @cache
    def undamaged(command: Command) -> Outcome:
        case = copied(world, "right")
        command.before(case)
        result = run(command, case)
        assert result.code == 0, f"{command.line}: {result.stderr}"
        return result

    return undamaged


def copied(world: Path, name: str) -> Path:
    case = world.with_name(name)
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(world, case)
    return case


@pytest.mark.parametrize("kind", COMMANDS)
def test_damage_gives_an_error_in_words_or_the_right_result(kind, world, right):
    problems = []
    numbers = range(FIRST, FIRST + CASES)
    for number in (number for number in numbers if list(COMMANDS)[number % len(COMMANDS)] == kind):
        chosen = np.random.default_rng(number).permutation(len(COMMANDS[kind]))
        for command in (COMMANDS[kind][at] for at in chosen[:MOST]):
            case = copied(world, "case")
            what = mutate(case / kind, np.random.default_rng(number))
            command.before(case)
            before = bystanders(case, kind, command)
            outcome = run(command, case)
            wrong = faults(command, right(command), outcome)
            if bystanders(case, kind, command) != before:
                wrong.append("something else was changed")
            problems += [f"{number}: {what}: {command.line}: {each}\n{outcome.stderr[-600:]}" for each in wrong]
    assert not problems, "\n".join(problems)
