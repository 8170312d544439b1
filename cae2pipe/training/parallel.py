"""One model on several processes: DDP and FSDP2."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from cae2pipe.models.layers import Stack
from cae2pipe.runtime.world import World


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """All blocks of all stacks in a module: the units of sharding, gathering and compiling."""
    return [block for part in module.modules() if isinstance(part, Stack) for block in part.blocks]


def wrap_model(objective: nn.Module, world: World) -> nn.Module:
    """The module to call: the objective itself, wrapped in DDP, or with its weights sharded in place (FSDP2).

    Must be called before the optimizer is made, since sharding replaces the weights.
    """
    if world.parallel == "ddp":
        return _replicated(objective, world)
    if world.parallel == "fsdp":
        return _sharded(objective, world)
    return objective


def _replicated(objective: nn.Module, world: World) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    # Buffers are constants. torch 2.14 renamed the option.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, option: False}
    if world.device.type == "cuda":
        options["device_ids"] = [world.device]
    return DistributedDataParallel(objective, **options)


def _sharded(objective: nn.Module, world: World) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # Weights are gathered in float32, and autocast rounds the same tensors as without sharding. FSDP's own mixed
    # precision would also round norms and LayerScale, which stay in float32.
    mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


@contextmanager
def no_sync(module: Any, world: World) -> Iterator[None]:
    """Context for all parts of a batch but the last: backward passes only accumulate this process's gradients."""
    if world.parallel == "ddp":
        with module.no_sync():
            yield
    elif world.parallel == "fsdp":
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    else:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A possibly sharded tensor as a plain one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
