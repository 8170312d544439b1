"""Runs a part in a separate process, so that a crash, a hang or exhausted memory does not affect the suite.

python -m benchmarks.gpu.child JOB.json, which the suite writes; the result is a JSON file in the same folder.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch._inductor.config

from benchmarks.gpu.parts import Found, Part, Result, plain, run_here
from benchmarks.gpu.state import State
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.processes import worker_count

ROOT = Path(__file__).parents[2]

SIDE_BY_SIDE = 4
"""Approximate number of processes that share the machine's cores: the suite's own and those of concurrent parts."""


def run_apart(part: Part, state: State, limit: float, running: set[subprocess.Popen[bytes]]) -> Result:
    """Run a part in a separate process, and kill it and all processes it has started after ``limit`` seconds.

    ``running`` contains the process while it is alive, so that another thread can kill it too.
    """
    job = state.scratch / f"job-{part.name}.json"
    job.write_text(json.dumps({"part": asdict(part), "state": state.to_json()}))
    said = job.with_suffix(".log")
    began = time.perf_counter()
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.child", str(job)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.add(process)
        try:
            code = process.wait(limit)
            ended = (
                f"the process ended with {code}" if code >= 0 else f"the process died of {signal.Signals(-code).name}"
            )
        except subprocess.TimeoutExpired:
            ended = f"the process did not end within {limit:.0f} s"
        finally:
            end(process)
            running.discard(process)
    seconds = time.perf_counter() - began
    answer = answer_path(job)
    if not answer.exists():
        return Result(seconds=seconds, error=f"{ended}; its last output:\n" + tail(said))
    values = json.loads(answer.read_text())
    return Result(Found(**values["found"]), seconds, values["error"], values["not_here"])


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and its children, whether it has ended or not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def answer_path(job: Path) -> Path:
    return job.with_suffix(".answer.json")


def tail(path: Path, most: int = 3000) -> str:
    """The end of a text file."""
    return path.read_bytes()[-most:].decode(errors="replace")


def main() -> None:
    """The child's side."""
    faulthandler.enable()
    # If the suite itself is killed, its end of the pipe closes.
    threading.Thread(target=_end_with_suite, daemon=True).start()
    job = Path(sys.argv[1])
    values = json.loads(job.read_text())
    prepare(State.from_json(values["state"]))
    part = Part(**values["part"] | {"arguments": tuple(values["part"]["arguments"])})
    result = run_here(part, State.from_json(values["state"]))
    answer = {"found": plain(asdict(result.found)), "error": result.error, "not_here": result.not_here}
    whole = job.with_suffix(".tmp")
    whole.write_text(json.dumps(answer))
    whole.replace(answer_path(job))


def prepare(state: State) -> None:
    """Select the device, and limit threads to a share of the cores: several parts run at once, and threads that compete
    for cores are far slower than fewer threads."""
    pick_device(state.device)
    share = max(1, worker_count(-1) // SIDE_BY_SIDE)
    torch.set_num_threads(1 if state.quick and not state.on_cuda else share)
    torch._inductor.config.compile_threads = share


def _end_with_suite() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
