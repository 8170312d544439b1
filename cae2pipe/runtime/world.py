"""The processes of a run: their process group, and what they exchange."""

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
"""For work of the main process while the others wait: scores of cached features, pages."""


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``ranks``, on ``device``. ``parallel``: ddp, fsdp, or neither."""

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
        """Wait until all processes have reached this point."""
        if self.ranks > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Copy the main process's buffers, such as running statistics, to all processes."""
        if self.ranks > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of ranks, in every process."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def patient_group(self) -> Any:
        """A process group for exchanges on the host that may take hours, None for a single process. Must be called by
        all processes."""
        return dist.new_group(backend="gloo", timeout=timedelta(days=7)) if self.ranks > 1 else None

    def gather_on_main(self, value: T, group: Any) -> list[T]:
        """The values of all processes in the main process; [] in the others. ``group``: a patient one."""
        if self.ranks == 1:
            return [value]
        values: list[Any] | None = [None] * self.ranks if self.is_main else None
        dist.gather_object(value, values, dst=0, group=group)
        return values or []

    def answer_of_main(self, value: T, group: Any) -> T:
        """The main process's value, in every process. ``group``: a patient one."""
        if self.ranks == 1:
            return value
        answer: list[Any] = [value]
        dist.broadcast_object_list(answer, src=0, group=group)
        result: T = answer[0]
        return result

    def run_on_main(self, work: Callable[[], T]) -> T:
        """The result of ``work`` in the main process, in all of them. An error is raised everywhere, and shown once."""
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
        """The result of ``work``, done by the main process first and then by the others; its error is shown once."""
        done: list[T] = []
        self.run_on_main(lambda: done.append(work()))
        return done[0] if self.is_main else work()


@contextmanager
def stage_world(
    device: str, report: Report, *, parallel: str = "ddp", patience: timedelta | None = PATIENCE
) -> Iterator[tuple[World, Report]]:
    """The processes of a stage that torchrun may have started, on their devices, and what each reports to.

    Args:
        device: as ``pick_device`` takes it. report: of the main process; the others show nothing.
        parallel, patience: as for ``init_distributed``.

    Raises:
        SettingsError: there is no such device, or torchrun's variables are invalid.
    """
    rank = torchrun_rank()
    with init_distributed(rank, pick_device(device, rank), parallel, patience=patience) as world:
        yield world, report if world.is_main else Silent()


@contextmanager
def init_distributed(
    rank: Rank, device: torch.device, parallel: str, *, patience: timedelta | None = None
) -> Iterator[World]:
    """The world of a training run: its process group is created here, and destroyed at the end. Inside another world,
    as in several trainings one after the other, the existing group is used: a second one would not be created.

    Args:
        parallel: ddp or fsdp. patience: how long one process may wait for the others; None: torch's default.

    Raises:
        SettingsError: the address of the process group is not set.
    """
    if rank.ranks == 1:
        yield World(0, 1, device)
        return
    address, port = (os.environ.get(name, "") for name in MEETING)
    if not dist.is_initialized() and not (address and re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
        raise SettingsError(
            f"MASTER_ADDR={address!r} and MASTER_PORT={port!r} are no address for a group of {rank.ranks} processes",
            where="environment",
            fix="start with torchrun, which sets these variables",
        )
    world, inner = World(rank.rank, rank.ranks, device, parallel=parallel), dist.is_initialized()
    if not inner:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield world
        # A process that exits while others still work could crash them.
        world.barrier()
    finally:
        if not inner:
            dist.destroy_process_group()
