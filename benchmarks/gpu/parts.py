"""Parts of the suite and their results."""

from __future__ import annotations

import gc
import importlib
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.gpu.state import State
from cae2pipe.runtime.device import set_backends


class NotHereError(Exception):
    """A part, or one of its measurements, cannot run on this machine. The message is the reason."""


@dataclass
class Found:
    """Results of a part so far; kept if it fails halfway.

    ``checks`` are rows of ``at_least`` and ``at_most`` that decide whether the part is ok; ``goals`` are such rows for
    information only; ``rows`` are measurements; ``facts`` are other results; ``skipped`` lists what was skipped, with
    reasons.
    """

    checks: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def check(self, name: str, ok: bool) -> None:
        """Add a check without a number."""
        self.checks.append({"name": name, "value": ok, "goal": "true", "ok": bool(ok)})


@dataclass(frozen=True)
class Part:
    """One part of the suite.

    Args:
        name: as in ``--parts``.
        run: ``module:function``, called with the state, the ``Found`` to fill, and ``arguments``.
        estimate: seconds on one H100.
        lane: ``main``: in the suite's own process, one by one; ``concurrent``: in a separate process, concurrently with
        others; ``alone``: in the suite's process while nothing else runs, since it measures times; ``apart``: in a
        separate process while nothing else runs. needs_cuda: the reason for which it is skipped on a CPU.
    """

    name: str
    run: str
    estimate: float
    lane: str = "main"
    arguments: tuple[str, ...] = ()
    needs_cuda: str = ""

    @property
    def timed(self) -> bool:
        """Whether nothing else may run meanwhile."""
        return self.lane in ("alone", "apart")

    @property
    def child(self) -> bool:
        """Whether it runs in a separate process."""
        return self.lane in ("concurrent", "apart")


@dataclass
class Result:
    """Outcome of a part. ``error``: the error with its traceback; ``not_here``: why it could not run here."""

    found: Found = field(default_factory=Found)
    seconds: float = 0.0
    error: str | None = None
    not_here: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def plain(self) -> dict[str, Any]:
        """The form in the JSON file."""
        found = {name: plain(value) for name, value in asdict(self.found).items() if value}
        return {"ok": self.ok, "seconds": round(self.seconds, 1), "found": found, "error": self.error}


def run_here(part: Part, state: State) -> Result:
    """Run a part in this process. Exceptions are part of the result; the device is cleaned up afterwards."""
    result = Result()
    began = time.perf_counter()
    try:
        if part.needs_cuda and not state.on_cuda:
            raise NotHereError(part.needs_cuda)
        torch.manual_seed(0)
        set_backends()
        call = function_of(part.run)
        call(state, result.found, *part.arguments)
        missed = [row["name"] for row in result.found.checks if not row["ok"]]
        if missed:
            result.error = "missed: " + "; ".join(missed)
    except NotHereError as reason:
        result.not_here = str(reason)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        result.error = traceback.format_exc()
    result.seconds = time.perf_counter() - began
    # Outside the handler, where the traceback would still hold the part's tensors.
    try:
        clean(state)
    except Exception:
        result.error = (result.error or "") + "\nand afterwards:\n" + traceback.format_exc()
    return result


def function_of(name: str) -> Callable[..., None]:
    """``module:function``."""
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found


def clean(state: State) -> None:
    """Reset compiled graphs, cached device memory, and settings of the process."""
    torch.compiler.reset()
    torch.set_grad_enabled(True)
    gc.collect()
    if state.on_cuda:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    set_backends()


def plain(value: Any) -> Any:
    """JSON values: keys and numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
