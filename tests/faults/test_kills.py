"""Whatever stops an extraction, and wherever: the same command then makes the set that an undisturbed run makes.

``make faults N=30`` tries more points than ``make test`` does.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cae2pipe.keyed import keyed_uniforms
from cae2pipe.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from tests.conftest import contents
from tests.faults.victim import EXITS, FAULTS, run

POINTS = int(os.environ.get("CAE2PIPE_FAULTS", "2"))
"""Points tried of each kind of fault."""


@pytest.fixture(scope="module")
def victim(photos: Path, extract_settings: Callable) -> Callable[[Path, str, int], tuple[int, int]]:
    """Runs an extraction with a fault in a process of its own; gives its exit code and the events it counted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cae2pipe.stages.extract_targets", "open_clip", "cae2pipe.cli"])

    def start(out: Path, fault: str, at: int) -> tuple[int, int]:
        counted = out.with_name("events")
        counted.unlink(missing_ok=True)
        process = context.Process(target=run, args=(photos, out, extract_settings(), fault, at, counted))
        process.start()
        process.join()
        return process.exitcode, int(counted.read_text()) if counted.exists() else 0

    return start


@pytest.fixture(scope="module")
def events(victim: Callable, target_root: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Events of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    code, count = victim(out, "SIGKILL", -1)
    assert code == 0
    assert contents(out) == contents(target_root)
    return count


@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_command_goes_on_to_the_same_bytes(
    victim, events, photos, target_root, tmp_path, extract_settings, fault, point
) -> None:
    at = 1 + int(keyed_uniforms(1, "fault", fault, point)[0] * events)
    out = tmp_path / "set"
    code, _ = victim(out, fault, at)
    assert code == EXITS[fault], f"{fault} at event {at} of {events}"
    extract_targets(photos, out, extract_settings(), Silent())
    assert contents(out) == contents(target_root), f"{fault} at event {at} of {events}"


def test_killed_again_and_again_it_still_arrives(victim, events, photos, target_root, tmp_path, extract_settings):
    out = tmp_path / "set"
    for turn in range(3):
        code, _ = victim(out, "SIGKILL", events // 5 + turn)
        assert code == EXITS["SIGKILL"]
    extract_targets(photos, out, extract_settings(), Silent())
    assert contents(out) == contents(target_root)
