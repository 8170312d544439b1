"""Two torchrun agents, as on two machines, one of which dies with its process and is started again.

Takes minutes, mostly torch's own time-outs, so it only runs in ``make faults``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_lines

ROOT = Path(__file__).parents[2]
PATIENCE = 240


@pytest.mark.skipif("CAE2PIPE_FAULTS" not in os.environ, reason="takes minutes: make faults")
def test_an_agent_that_is_started_again_joins_and_the_run_is_the_same(target_root, pretrain_settings, tmp_path):
    settings = pretrain_settings(epochs=40, speed={"checkpoint_minutes": 1e-9, "keep": 1})
    job = tmp_path / "job.json"
    given = {"targets": str(target_root), "out": str(tmp_path / "two"), "settings": settings.model_dump(mode="json")}
    job.write_text(json.dumps(given))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without it, an agent of torch 2.14 that joins a later round waits for an address that is never sent.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}

    def agent(first: bool) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--max-restarts=3"]
        local = ["--local-addr=127.0.0.1", f"--rdzv-conf=is_host={int(first)},join_timeout={PATIENCE}"]
        command = [*launcher, *meeting, *local, "-m", "tests.training.rank", str(job)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    agents = [agent(True), agent(False)]
    try:
        started = tmp_path / "two" / "metrics.jsonl"
        while not (started.exists() and len(started.read_bytes().splitlines()) > 20):
            with pytest.raises(subprocess.TimeoutExpired):
                agents[0].wait(0.2)
        # As when a machine dies: the process with its agent.
        own = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True, check=True)
        for pid in (agents[1].pid, *map(int, own.stdout.split())):
            os.kill(pid, signal.SIGKILL)
        agents[1].wait()
        agents[1] = agent(False)
        assert [each.wait(PATIENCE) for each in agents] == [0, 0]
    finally:
        for each in agents:
            each.kill()
    pretrain(target_root, tmp_path / "one", settings, report=Silent())
    two, one = ([line["loss"] for line in read_lines(tmp_path / out / "metrics.jsonl")] for out in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-3)
    assert (tmp_path / "two" / "encoder.safetensors").is_file()
