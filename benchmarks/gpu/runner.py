"""Runs the parts: the most important first, isolated, within a budget; results are written to disk after each."""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.child import SIDE_BY_SIDE, end, run_apart
from benchmarks.gpu.parts import Part, Result, run_here
from benchmarks.gpu.state import State
from benchmarks.harness import print_table
from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.runtime.processes import worker_count

GRACE = 60.0
"""Seconds beyond the budget after which the suite ends itself, because a part in its own process hangs."""


class Record:
    """Results so far, in the form of the JSON file, which is rewritten on every change. Thread-safe."""

    def __init__(self, out: Path | None, head: dict[str, Any], began: float):
        self.out, self.began = out, began
        self.content: dict[str, Any] = {**head, "seconds": 0.0, "parts": {}, "skipped": []}
        self._lock = threading.Lock()

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def add(self, part: Part, result: Result) -> None:
        """Record a part's result, and print a line about it."""
        if result.not_here is not None:
            self.skip(part, result.not_here)
            return
        with self._lock:
            self.content["parts"][part.name] = result.plain()
            self._write()
        last = (result.error or "").strip().splitlines()[-1:] or [""]
        self._say(part, f"{'ok' if result.ok else 'FAILED'} ({result.seconds:.1f} s) {last[0]}")

    def skip(self, part: Part, reason: str) -> None:
        """Record why a part was skipped."""
        with self._lock:
            self.content["skipped"].append({"part": part.name, "reason": reason})
            self._write()
        self._say(part, f"skipped: {reason}")

    def failed(self) -> bool:
        return any(not part["ok"] for part in self.content["parts"].values())

    def _say(self, part: Part, text: str) -> None:
        print(f"[{self.elapsed():6.1f}s] {part.name} {text}".rstrip(), flush=True)

    def _write(self) -> None:
        self.content["seconds"] = round(self.elapsed(), 1)
        if self.out:
            write_bytes(self.out, (json.dumps(self.content, indent=1, allow_nan=False) + "\n").encode())


def run_suite(
    parts: Sequence[Part],
    state: State,
    budget: float,
    out: Path | None,
    head: dict[str, Any],
    began: float | None = None,
) -> Record:
    """Run parts within ``budget`` seconds since ``began`` (``time.perf_counter``; None: now).

    Parts of the lane ``concurrent`` start immediately in separate processes, a few at a time. Meanwhile the others run
    here one by one; those that measure times wait until nothing else runs. A part whose estimate does not fit the
    remaining budget is skipped. After a part has left the device unusable, the others run in separate processes.
    """
    began = time.perf_counter() if began is None else began
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = Record(out, {**head, "started": started, "budget_s": budget}, began)
    running: set[subprocess.Popen[bytes]] = set()
    pool = ThreadPoolExecutor(max(2, min(SIDE_BY_SIDE, worker_count(-1) // SIDE_BY_SIDE)))
    # The current part of the main thread, for the watchdog.
    at: list[Part] = []

    def concurrent(part: Part) -> None:
        if fits(part, record, budget):
            record.add(part, run_apart(part, state, limit(part, state), running))

    watch = threading.Timer(max(1.0, budget + GRACE - record.elapsed()), _give_up, (record, at, running, state))
    watch.daemon = True
    watch.start()
    try:
        side: list[Future[None]] = [pool.submit(concurrent, part) for part in parts if part.lane == "concurrent"]
        usable = True
        for part in parts:
            if part.lane == "concurrent":
                continue
            if part.timed:
                wait(side)
            if not fits(part, record, budget):
                continue
            at[:] = [part]
            if part.child or not usable:
                result = run_apart(part, state, limit(part, state), running)
            else:
                result = run_here(part, state)
                usable = result.ok or is_usable(state)
            at.clear()
            record.add(part, result)
        wait(side)
        for future in side:
            future.result()
    finally:
        watch.cancel()
        for process in list(running):
            end(process)
        pool.shutdown(cancel_futures=True)
    return record


def fits(part: Part, record: Record, budget: float) -> bool:
    """Whether a part's estimate fits the remaining budget; if not, it is recorded as skipped."""
    left = budget - record.elapsed()
    if part.estimate <= left:
        return True
    record.skip(part, f"takes about {part.estimate:.0f} s, but only {max(0.0, left):.0f} s of the budget are left")
    return False


def limit(part: Part, state: State) -> float:
    """Seconds after which a part in a separate process counts as hanging."""
    return (30 + 3 * part.estimate) * (1 if state.on_cuda else 3)


def is_usable(state: State) -> bool:
    """Whether the device still works. An illegal access makes it unusable for the whole process."""
    if not state.on_cuda:
        return True
    try:
        return bool(torch.ones(2, device=state.place).sum().item() == 2)
    except Exception:
        return False


def _give_up(record: Record, at: list[Part], running: set[subprocess.Popen[bytes]], state: State) -> None:
    """End the suite from the watchdog, keeping all results so far."""
    faulthandler.dump_traceback(file=sys.stderr)
    for part in list(at):
        record.add(part, Result(error="did not end; the suite has ended itself"))
    for process in list(running):
        end(process)
    shutil.rmtree(state.scratch, ignore_errors=True)
    sys.stdout.flush()
    os._exit(1)


def print_record(record: Record) -> None:
    """Checks, goals and measurements of all parts as tables."""
    parts = record.content["parts"]
    for title, kind in (("checks", "checks"), ("goals, which decide nothing", "goals")):
        print_rows(
            title, [{"part": name, **row} for name, part in parts.items() for row in part["found"].get(kind, [])]
        )
    measured: dict[str, list[dict[str, Any]]] = {}
    for name, part in parts.items():
        # Parts such as C-tiny and C-base share a table.
        measured.setdefault(name.split("-")[0], []).extend(part["found"].get("rows", []))
    for name, rows in measured.items():
        print_rows(f"{name}: measured", rows)
    left = [
        {"part": name, "left out": what, "reason": reason}
        for name, part in parts.items()
        for what, reason in part["found"].get("skipped", {}).items()
    ]
    left += [{"part": each["part"], "left out": "all", "reason": each["reason"]} for each in record.content["skipped"]]
    print_rows("left out", left)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        print_table(title, rows)
