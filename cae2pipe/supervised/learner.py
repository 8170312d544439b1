"""Base of all learners that train a whole network on labels: AdamW with layer-wise rates, chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.upload import upload_stream, uploaded
from cae2pipe.runtime.world import World
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.supervised.remedies import SMALLER, cpu_remedy
from cae2pipe.supervised.schedule import Chunk
from cae2pipe.training.optimizer import make_moments
from cae2pipe.training.parallel import no_sync, wrap_model


class TunedLearner(ABC):
    """Trains a network.

    Args:
        network: the network to train. groups: its parameters, each group with its ``lr_scale``. betas: AdamW's.
        world: the processes. bf16: compute under autocast. clip: largest gradient norm; None: no clipping.
    """

    def __init__(
        self,
        network: Normalised,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        world: World,
        bf16: bool,
        clip: float | None = None,
    ):
        self.network, self.world, self.bf16, self.clip = network, world, bf16, clip
        self.stream = upload_stream(world.device)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        with memory_advice("AdamW's state for all weights", SMALLER):
            make_moments(self.optimizer)
        self.module = wrap_model(network, world)

    @abstractmethod
    def loss(self, chunk: Chunk) -> Tensor:
        """The mean loss of a chunk. All random draws depend on the seed, the step and the chunk only."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """The learning rate of a step, of parameters with an ``lr_scale`` of 1."""

    def scaled_rate(self, step: int, scale: float) -> float:
        """The learning rate of a step, of parameters with this ``lr_scale``."""
        return self.rate(step) * scale

    def step(self, chunks: list[Chunk], step: int, size: int) -> Tensor:
        """See ``loop.Learner``."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        for index, chunk in enumerate(uploaded(chunks, self.world.device, self.stream)):
            last = index == len(chunks) - 1
            with nullcontext() if last else no_sync(self.module, self.world):
                loss = self.loss(chunk) * (len(chunk.labels) / size)
                # DDP averages over processes; the loss is a sum over them.
                (loss * self.world.ranks).backward()
            total += loss.detach()
        if self.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.scaled_rate(step, group["lr_scale"])
        self.optimizer.step()
        return total

    def scoring_advice(self) -> AbstractContextManager[None]:
        """Around the scoring of one image, whose size no setting changes: if it does not fit, advise to use the CPU."""
        fix = cpu_remedy(f"precision={'bf16' if self.bf16 else 'fp32'}")
        return memory_advice("one image to be scored", f"{fix} resumes from the last checkpoint")

    def state(self) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
