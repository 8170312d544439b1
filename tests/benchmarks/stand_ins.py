"""Stub parts with every possible outcome; in a module, so that child processes can import them."""

from __future__ import annotations

import os
import signal
import threading

from benchmarks.gpu.parts import Found, NotHereError
from benchmarks.gpu.state import State


def fine(state: State, found: Found, said: str = "") -> None:
    found.facts["said"] = said
    found.check("it ran", True)


def raises(state: State, found: Found) -> None:
    found.rows.append({"before": 1})
    raise RuntimeError("as a part may")


def misses(state: State, found: Found) -> None:
    found.check("what was hoped for", False)


def not_here(state: State, found: Found) -> None:
    raise NotHereError("there is no such thing here")


def dies(state: State, found: Found) -> None:
    os.write(1, b"these were its last words")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(state: State, found: Found) -> None:
    threading.Event().wait()
