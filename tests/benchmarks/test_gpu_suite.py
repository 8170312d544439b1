"""The GPU suite itself, on the CPU: its parts work, and a failing part does not affect others."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import child, compiled, listing, runner
from benchmarks.gpu.parts import Found, Part, Result, run_here
from benchmarks.gpu.state import State

HERE = "tests.benchmarks.stand_ins"
SAME = {"B3-rivals", "C-small", "C-large", "C-base-accumulation", "C-small-official", "C-large-official"}
"""Parts that differ from others only in their settings, and would take a quarter of the time."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.delenv("CAE2PIPE_REAL", raising=False)
    (tmp_path / "scratch").mkdir()
    return State("cpu", True, tmp_path / "scratch", listing.SIZES)


def run(parts: list[Part], state: State, out: Path, budget: float = 1000) -> dict:
    runner.run_suite(parts, state, budget, out, {"benchmark": "gpu"})
    return json.loads(out.read_text())


@pytest.mark.filterwarnings("ignore:CAE2PIPE_REAL")
def test_every_part_is_ok_or_says_why_not(state, tmp_path):
    """The real parts in one process, since starting a process takes longer than most parts."""
    parts = [replace(part, lane="main") for part in listing.PARTS if part.name not in SAME]
    content = run(parts, state, tmp_path / "result.json")
    assert {name: part["error"] for name, part in content["parts"].items() if not part["ok"]} == {}
    assert [entry["part"] for entry in content["skipped"]] == ["B4"]
    assert "CUDA" in content["skipped"][0]["reason"]
    assert content["parts"].keys() | {"B4"} == {part.name for part in parts}
    reasons = {what for part in content["parts"].values() for what in part["found"].get("skipped", {})}
    allowed = {"the card", "compiled runs", "memory fraction", "nvJPEG", "flash"}
    assert reasons <= allowed
    checks = [row for part in content["parts"].values() for row in part["found"].get("checks", [])]
    assert len(checks) > 70


def test_a_part_that_fails_takes_no_other_along(state, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "limit", lambda part, state: 0.5 if part.name == "hangs" else 200)
    parts = [
        Part("dies", f"{HERE}:dies", 1, "concurrent"),
        Part("raises", f"{HERE}:raises", 1),
        Part("misses", f"{HERE}:misses", 1),
        Part("not here", f"{HERE}:not_here", 1),
        Part("needs a card", f"{HERE}:fine", 1, needs_cuda="there is none"),
        Part("hangs", f"{HERE}:hangs", 1, "apart"),
        Part("long", f"{HERE}:fine", 5000),
        Part("last", f"{HERE}:fine", 1, "apart", ("here",)),
    ]
    content = run(parts, state, tmp_path / "result.json")
    parts_done = content["parts"]
    assert {name: part["ok"] for name, part in parts_done.items()} == {
        "dies": False,
        "raises": False,
        "misses": False,
        "hangs": False,
        "last": True,
    }
    assert "died of SIGKILL" in parts_done["dies"]["error"]
    assert "these were its last words" in parts_done["dies"]["error"]
    assert "RuntimeError: as a part may" in parts_done["raises"]["error"]
    assert parts_done["raises"]["found"]["rows"] == [{"before": 1}]
    assert parts_done["misses"]["error"] == "missed: what was hoped for"
    assert "did not end within" in parts_done["hangs"]["error"]
    assert parts_done["last"]["found"]["facts"] == {"said": "here"}
    skipped = {entry["part"]: entry["reason"] for entry in content["skipped"]}
    assert skipped.keys() == {"not here", "needs a card", "long"}
    assert skipped["not here"] == "there is no such thing here"
    assert "of the budget are left" in skipped["long"]
    said = capsys.readouterr().out
    assert "raises FAILED" in said
    assert "last ok" in said


def test_a_device_left_unusable_is_left_to_child_processes(state, tmp_path, monkeypatch):
    apart: list[str] = []

    def run_apart(part, state, limit, running):
        apart.append(part.name)
        return Result()

    monkeypatch.setattr(runner, "is_usable", lambda state: False)
    monkeypatch.setattr(runner, "run_apart", run_apart)
    parts = [Part("first", f"{HERE}:fine", 1), Part("raises", f"{HERE}:raises", 1), Part("then", f"{HERE}:fine", 1)]
    content = run(parts, state, tmp_path / "result.json")
    assert apart == ["then"]
    assert content["parts"]["first"]["ok"]


def test_the_file_is_whole_after_every_part(state, tmp_path, monkeypatch):
    out, seen = tmp_path / "result.json", []
    real = runner.Record.add

    def add(self, part, result):
        real(self, part, result)
        seen.append(list(json.loads(out.read_text())["parts"]))

    monkeypatch.setattr(runner.Record, "add", add)
    run([Part("one", f"{HERE}:fine", 1), Part("two", f"{HERE}:raises", 1)], state, out)
    assert seen == [["one"], ["one", "two"]]


def test_a_suite_that_hangs_ends_itself(state, tmp_path, monkeypatch, capfd):
    class EndedError(Exception):
        pass

    def leave(code: int):
        raise EndedError(code)

    monkeypatch.setattr(runner.os, "_exit", leave)
    out = tmp_path / "result.json"
    record = runner.Record(out, {}, 0.0)
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    with pytest.raises(EndedError):
        runner._give_up(record, [Part("stuck", f"{HERE}:hangs", 1)], {process}, state)
    assert process.returncode == -9
    assert "did not end" in json.loads(out.read_text())["parts"]["stuck"]["error"]
    assert not state.scratch.exists()


def test_a_child_ends_with_the_suite(monkeypatch):
    ended = []
    monkeypatch.setattr(child.os, "_exit", ended.append)
    monkeypatch.setattr(child.sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"")))
    child._end_with_suite()
    assert ended == [1]


def test_parts_are_chosen_by_name_and_size():
    assert [part.name for part in listing.select("B3,E", listing.SIZES)] == ["B3", "B3-rivals", "E1", "E2", "E3"]
    sizes = {part.name for part in listing.select("C", ("tiny", "large"))}
    assert sizes == {"C-tiny", "C-large", "C-large-official"}
    with pytest.raises(ValueError, match="unknown part Q"):
        listing.select("A,Q", listing.SIZES)
    with pytest.raises(ValueError, match="unknown size vast"):
        listing.select(None, ("vast",))


def test_estimates_fit_the_budget():
    """Concurrent parts must finish before the others do; variants of a size come last, and may be dropped."""
    parts = listing.PARTS
    core = [part for part in parts if part.name.count("-") < 2]
    in_turn = sum(part.estimate for part in core if part.lane != "concurrent")
    first = sum(part.estimate for part in core if part.lane == "main")
    concurrent = [part.estimate for part in parts if part.lane == "concurrent"]
    assert in_turn + max(0, sum(concurrent) / 4 - first) <= 900 - 10
    lanes = [part.timed for part in parts if part.lane != "concurrent"]
    assert lanes == sorted(lanes)


def test_the_command_writes_what_it_was_asked_for(tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    monkeypatch.setattr(command.sys, "argv", ["gpu", "--device", "cpu", "--quick", "--parts", "E2", "--out", str(out)])
    monkeypatch.setattr(command, "BEGAN", command.time.perf_counter())
    monkeypatch.delenv("CAE2PIPE_REAL", raising=False)
    assert command.main() == 0
    content = json.loads(out.read_text())
    head = {"benchmark", "device", "versions", "quick", "sizes", "stand_ins", "started", "budget_s", "seconds", "parts"}
    assert content.keys() == head | {"skipped"}
    assert content["stand_ins"]["photographs"] == "noise"
    assert content["parts"]["E2"]["ok"]
    assert "klt: share of symbols that differ" in capsys.readouterr().out
    monkeypatch.setattr(command.sys, "argv", ["gpu", "--parts", "Q"])
    with pytest.raises(SystemExit):
        command.main()


def test_waiting_for_the_device_is_looked_for_in_warm_steps(state, monkeypatch):
    """Part B4, which a CPU skips, with torch's switch watched instead: it is on in warm steps, and off at the end."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    real = compiled.Outcome.values
    read = []

    def values(self):
        read.append((modes[-1] if modes else None, self.batch.step))
        return real(self)

    monkeypatch.setattr(compiled.Outcome, "values", values)
    measured = Found()
    compiled.without_waiting(state, measured)
    assert modes == ["error", "default"] * 2
    warm = [step for mode, step in read if mode == "error"]
    assert warm == [2, 3, 4] * 2
    assert all(row["ok"] for row in measured.checks)


def test_a_card_is_described_and_cleaned_as_torch_allows(state, monkeypatch):
    """Lines that only CUDA reaches, against the signatures of torch's own functions."""
    from benchmarks.gpu import exhaustion, machine, speed

    about = SimpleNamespace(total_memory=80e9, multi_processor_count=132)
    answers = {
        "get_device_properties": about,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "memory_allocated": 0,
        "max_memory_reserved": 2e9,
        "set_per_process_memory_fraction": None,
        "set_sync_debug_mode": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    calls = {}
    for name, answer in answers.items():
        calls[name] = create_autospec(getattr(torch.cuda, name), return_value=answer)
        monkeypatch.setattr(torch.cuda, name, calls[name])
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(State, "on_cuda", property(lambda self: True))
    monkeypatch.setattr(State, "backend", "aot_eager")
    described = machine.card(state.place)
    assert described["device_memory_gb"] == 80.0
    assert run_here(Part("fine", f"{HERE}:fine", 1), state).ok
    assert calls["reset_peak_memory_stats"].called
    with exhaustion.limited(state, Found()):
        pass
    fractions = [call.args[0] for call in calls["set_per_process_memory_fraction"].call_args_list]
    assert fractions == [1.0e9 / 80e9, 1.0]
    full = replace(state, quick=False)
    assert [speed.first_batch(full, name) for name in ("base", "large")] == [2048, 512]
    about.total_memory = 24e9
    assert speed.first_batch(full, "base") == 512
    measured = Found()
    speed.size(state, measured, "tiny", "eager")
    assert measured.rows[0]["reserved_gb"] == 2.0
