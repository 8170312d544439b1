"""Several processes, one model: torchrun's ranks, DDP and FSDP2, and what they tell each other."""

from __future__ import annotations

import inspect
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

from cae2pipe.artifacts.parts import Rank
from cae2pipe.errors import Cae2pipeError, SettingsError
from cae2pipe.models.layers import Stack

T = TypeVar("T")

MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``ranks``, on ``device``. ``parallel``: ddp, fsdp, or none of them."""

    rank: int
    ranks: int
    device: torch.device
    parallel: str = "none"

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def meet(self) -> None:
        """Wait until all processes have come here."""
        if self.ranks > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def share(self, module: nn.Module) -> None:
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

    def lead(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the leading process, in all of them. An error there is raised everywhere, and shown
        once."""
        if self.ranks == 1:
            return work()
        told: list[Any] = [None, None]
        if self.leads:
            try:
                told[0] = work()
            except Cae2pipeError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, device=self.device)
        if told[1] is not None:
            told[1].shown_elsewhere = not self.leads
            raise told[1]
        result: T = told[0]
        return result

    def lead_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done by every process; an error that the leading one meets first is shown once."""
        done: list[T] = []
        self.lead(lambda: done.append(work()))
        return done[0] if self.leads else work()


@contextmanager
def joined(
    rank: Rank, device: torch.device, parallel: str, streams: int, patience: timedelta | None = None
) -> Iterator[World]:
    """The world of a training run; its processes meet here, and part at the end. Within another world, as where several
    trainings follow each other, they stay together: a second meeting of the same processes would not come about.

    Args:
        streams: what is to be shared out evenly.
        patience: how long one process may wait for the others; None: torch's default.

    Raises:
        SettingsError: the streams cannot be shared out evenly, or nothing says where the processes meet.
    """
    if streams % rank.ranks:
        error = SettingsError(
            f"data.streams {streams} cannot be shared out among {rank.ranks} processes",
            where="data.streams",
            fix=f"set data.streams to a multiple of {rank.ranks} that divides data.batch, or start another number of "
            "processes",
        )
        error.shown_elsewhere = rank.rank > 0
        raise error
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
    world, inner = World(rank.rank, rank.ranks, device, parallel), dist.is_initialized()
    if not inner:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield world
        # One that left while others still work could bring them down.
        world.meet()
    finally:
        if not inner:
            dist.destroy_process_group()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """All blocks of all stacks in a module: what is sharded, gathered and compiled by itself."""
    return [block for part in module.modules() if isinstance(part, Stack) for block in part.blocks]


def spread(objective: nn.Module, world: World) -> nn.Module:
    """The module to call: the objective itself, in DDP, or with its weights sharded in place (FSDP2).

    To be called before the optimizer is made: sharding replaces the weights.
    """
    if world.parallel == "ddp":
        return _replicated(objective, world)
    if world.parallel == "fsdp":
        return _sharded(objective, world)
    return objective


def _replicated(objective: nn.Module, world: World) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    # Buffers are constants. torch 2.14 gave the option another name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, option: False}
    if world.device.type == "cuda":
        options["device_ids"] = [world.device]
    return DistributedDataParallel(objective, **options)


def _sharded(objective: nn.Module, world: World) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # Weights travel in float32, and autocast rounds what it rounds without sharding: norms and LayerScale stay in
    # float32, which FSDP's own mixed precision would not leave them.
    mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


@contextmanager
def without_exchange(module: Any, world: World) -> Iterator[None]:
    """Within it, backward passes only add to this process's gradients: all parts of a batch but the last."""
    if world.parallel == "ddp":
        with module.no_sync():
            yield
    elif world.parallel == "fsdp":
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as a plain one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
