import os
import signal
import subprocess
import sys
import threading

import pytest

from cae2pipe.runtime.processes import shielded, worker_count

SCRIPTS = {
    "loader": """
from torch.utils.data import Dataset
from cae2pipe.runtime.workers import in_order

class Numbers(Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return index

if __name__ == "__main__":
    import os, signal
    next(in_order(Numbers(), 1))
    os.kill(os.getpid(), signal.SIGKILL)
""",
    "shard": """
from pathlib import Path
from cae2pipe.shards.checking import FileSlice, checking

if __name__ == "__main__":
    import os, signal
    with checking(1) as check:
        list(check([FileSlice(Path(__file__), 0, Path(__file__).stat().st_size)]))
        os.kill(os.getpid(), signal.SIGKILL)
""",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_workers_end_with_a_main_process_that_is_killed_outright(kind, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[kind])
    # Workers hold the pipe of stdout: the call returns only once they have ended.
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == -9


def test_worker_count():
    assert worker_count(0) == 0
    assert worker_count(5, most=2) == 5
    assert worker_count(-1, most=1) == 1
    assert worker_count(-1) >= 1


@pytest.mark.parametrize(("cores", "ranks", "each"), [(16, 1, 16), (16, 4, 4), (16, 3, 5), (2, 4, 1)])
def test_ranks_share_the_cores_of_their_machine(monkeypatch, cores, ranks, each):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2 * ranks), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(value))
    assert worker_count(-1) == each
    assert worker_count(7) == 7


def test_ctrl_c_while_processes_start_is_raised_at_the_end_whatever_thread_takes_it():
    # A shell starts background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), shielded():  # noqa: PT012
            seen: list[int] = []
            inside = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, lambda number, frame: (seen.append(number), inside(number, frame)))
            os.kill(os.getpid(), signal.SIGINT)
            # Blocked in this thread, it is taken by the other one, some time after it is no longer pending.
            while not seen:
                thread.join(0.01)
            started = True
        assert started
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
