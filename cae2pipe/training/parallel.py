"""Several processes, one model: torchrun's ranks, DDP and FSDP2, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cae2pipe.artifacts.parts import Rank
from cae2pipe.errors import Cae2pipeError, SettingsError
from cae2pipe.models.encoder import Block
from cae2pipe.models.regressor import RegressorBlock

T = TypeVar("T")

BLOCKS = (Block, RegressorBlock)
"""What is sharded, gathered and compiled by itself."""


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
        return told[0]

    def lead_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done by every process; an error that the leading one meets first is shown once."""
        done: list[T] = []
        self.lead(lambda: done.append(work()))
        return done[0] if self.leads else work()


@contextmanager
def joined(rank: Rank, device: torch.device, parallel: str, streams: int) -> Iterator[World]:
    """The world of a training run; its processes meet here, and part at the end.

    Raises:
        SettingsError: the streams cannot be shared out evenly.
    """
    if streams % rank.ranks:
        raise SettingsError(
            f"data.streams {streams} cannot be shared out among {rank.ranks} processes",
            where="data.streams",
            fix=f"set data.streams to a multiple of {rank.ranks} that divides data.batch, or start another number of "
            "processes",
        )
    if rank.ranks == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank.rank, rank.ranks, device, parallel)
    finally:
        dist.destroy_process_group()


def shard_model(model: nn.Module, world: World, bf16: bool) -> None:
    """FSDP2: shard the weights of every block, and of what is left, over all processes, in place."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Weights travel in bfloat16; the tokens between blocks stay in float32, as they do without sharding.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if bf16 else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
    for module in model.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def wrapped(objective: nn.Module, world: World) -> nn.Module:
    """The objective to call: in DDP where that is asked for."""
    if world.parallel != "ddp":
        return objective
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def without_exchange(module: nn.Module, model: nn.Module, world: World) -> Any:
    """A context in which backward passes only add to this process's gradients: all parts of a batch but the last."""
    if world.parallel == "ddp":
        return module.no_sync()  # type: ignore[operator]
    if world.parallel == "fsdp":
        return _unsynced(model)
    return nullcontext()


@contextmanager
def _unsynced(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as a plain one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
