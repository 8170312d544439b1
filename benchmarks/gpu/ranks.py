"""B8: DDP and FSDP2 with one process, with NCCL (on a CPU: gloo)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.divergence import diverge
from benchmarks.gpu.parts import Found
from benchmarks.gpu.repeats import metrics
from benchmarks.gpu.state import State
from benchmarks.harness import at_most
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import World
from cae2pipe.stages.pretrain import pretrain_within

PATIENCE = timedelta(seconds=60)


def one_process(state: State, found: Found) -> None:
    """Collectives, training, stopping and resuming, sharded divergence."""
    backend = "nccl" if state.on_cuda else "gloo"
    found.facts["backend"] = backend
    dist.init_process_group(
        backend, init_method=(state.scratch / "meeting").as_uri(), rank=0, world_size=1, timeout=PATIENCE
    )
    try:
        collectives(state, found)
        alone = trained(state, "none")
        for parallel in ("ddp", "fsdp"):
            lines = metrics(trained(state, parallel))
            wanted = metrics(alone)
            apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines, wanted, strict=True))
            found.checks.append(at_most(f"{parallel}: loss against one process's, relative, worst", apart, 1e-3, 7))
            halves = trained(state, parallel, "halves", stop_after=5)
            trained(state, parallel, "halves")
            again = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(metrics(halves), lines, strict=True))
            found.checks.append(at_most(f"{parallel}: stopped and resumed, the same loss, relative", again, 1e-3, 7))
        diverge(state, found, "fsdp", state.settings(speed={"parallel": "fsdp"}), World(0, 1, state.place, "fsdp"))
    finally:
        dist.destroy_process_group()


def collectives(state: State, found: Found) -> None:
    """The collectives that ``World`` uses with several processes."""
    ones = torch.ones(4, device=state.place)
    dist.all_reduce(ones)
    told: list[Any] = [{"step": 3}, None]
    dist.broadcast_object_list(told, src=0, device=state.place)
    gathered: list[Any] = [None]
    dist.all_gather_object(gathered, "here")
    dist.broadcast(ones, src=0)
    good = ones.tolist() == [1.0] * 4 and told == [{"step": 3}, None] and gathered == ["here"]
    found.check("all_reduce, broadcast, objects", good)


def trained(state: State, parallel: str, name: str = "whole", **over: Any) -> Path:
    """The folder of a run of ten steps in float32."""
    out = state.scratch / f"{parallel}-{name}"
    kind = "ddp" if parallel == "none" else parallel
    settings = state.settings(speed={"parallel": kind, "workers": 0}, **over)
    world = World(0, 1, state.place, parallel)
    pretrain_within(state.targets().root, out, settings, world=world, report=Silent())
    return out
