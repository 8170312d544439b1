"""The processes of a run: where they meet, and what they tell each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cae2pipe.errors import Cae2pipeError, SettingsError
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.progress import Report, Silent
from cae2pipe.runtime.ranks import Rank, torchrun_rank

T = TypeVar("T")

MEETING = ("MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=2)
"""For what the leading process does alone while the others wait: scores of cached features, pages."""


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``ranks``, on ``device``. ``parallel``: ddp, fsdp, or none of them."""

    rank: int
    ranks: int
    device: torch.device
    parallel: str = "none"

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.ranks > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give all processes the leading one's buffers, such as running statistics."""
        if self.ranks > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, in all of them."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the leading process, in all of them. An error there is raised everywhere, and shown
        once."""
        if self.ranks == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = work()
            except Cae2pipeError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            answer[1].shown_elsewhere = not self.is_main
            raise answer[1]
        result: T = answer[0]
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done by every process; an error that the leading one meets first is shown once."""
        done: list[T] = []
        self.run_on_main(lambda: done.append(work()))
        return done[0] if self.is_main else work()


@contextmanager
def stage_world(
    device: str, report: Report, *, parallel: str = "ddp", patience: timedelta | None = PATIENCE
) -> Iterator[tuple[World, Report]]:
    """How a stage opens that torchrun may have started: its processes on their devices, and what each reports to.

    Args:
        device: as ``pick_device`` takes it. report: the leading process's; what others say is not shown.
        parallel, patience: as ``init_distributed`` has them.

    Raises:
        SettingsError: there is no such device, or torchrun's variables say nothing that can be.
    """
    rank = torchrun_rank()
    with init_distributed(rank, pick_device(device, rank), parallel, patience=patience) as world:
        yield world, report if world.is_main else Silent()


@contextmanager
def init_distributed(rank: Rank, device: torch.device, parallel: str, *, patience: timedelta | None = None) -> Iterator[World]:
    """The world of a training run; its processes meet here, and part at the end. Within another world, as where several
    trainings follow each other, they stay together: a second meeting of the same processes would not come about.

    Args:
        parallel: ddp or fsdp. patience: how long one process may wait for the others; None: torch's default.

    Raises:
        SettingsError: nothing says where the processes meet.
    """
    if rank.ranks == 1:
        yield World(0, 1, device)
        return
    address, port = (os.environ.get(name, "") for name in MEETING)
    if not dist.is_initialized() and not (address and re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
        raise SettingsError(
            f"MASTER_ADDR={address!r} and MASTER_PORT={port!r} do not say where {rank.ranks} processes meet",
            where="environment",
            fix="start with torchrun, which sets these variables",
        )
    world, inner = World(rank.rank, rank.ranks, device, parallel=parallel), dist.is_initialized()
    if not inner:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield world
        # One that left while others still work could bring them down.
        world.barrier()
    finally:
        if not inner:
            dist.destroy_process_group()
