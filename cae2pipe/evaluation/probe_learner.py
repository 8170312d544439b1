"""Training of a head on a frozen encoder with new crops of every image in every epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.evaluation.attentive import AttentiveProbe
from cae2pipe.evaluation.encoders import FrozenEncoder
from cae2pipe.evaluation.linear import Probe
from cae2pipe.runtime.device import exact_float32
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.upload import upload_stream, uploaded
from cae2pipe.runtime.world import World
from cae2pipe.supervised.remedies import batch_remedy
from cae2pipe.supervised.schedule import Chunk, TrainSchedule
from cae2pipe.training.schedule import learning_rate

Inputs = Callable[[FrozenEncoder, Tensor], Tensor]
"""From an encoder and pixels to the input of a head."""


def pooled(feature: str) -> Inputs:
    """The class token or the mean patch token (B, D)."""

    def inputs(encoder: FrozenEncoder, pixels: Tensor) -> Tensor:
        features = encoder(pixels)
        if feature == "mean":
            return features.mean
        assert features.class_token is not None
        return features.class_token

    return inputs


def all_tokens(encoder: FrozenEncoder, pixels: Tensor) -> Tensor:
    """Class token and patches (B, T, D)."""
    return encoder.tokens(pixels).together()


class ProbeLearner:
    """Trains a head in float32; the encoder is frozen.

    Args:
        encoder, head, inputs: ``inputs`` computes the head's input from encoder and pixels.
        optimizer: the head's; each group has its ``peak`` learning rate.
        schedule: the order of images. warmup_epochs: epochs of linear warm-up.
        batch: images per forward pass of the encoder. world: the processes.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        head: Probe | AttentiveProbe,
        inputs: Inputs,
        *,
        optimizer: torch.optim.Optimizer,
        schedule: TrainSchedule,
        warmup_epochs: float,
        batch: int,
        world: World,
    ):
        self.encoder, self.head, self.inputs, self.optimizer = encoder, head, inputs, optimizer
        self.schedule, self.warmup_epochs, self.batch, self.world = schedule, warmup_epochs, batch, world
        self.stream = upload_stream(world.device)

    def step(self, chunks: list[Chunk], step: int, size: int) -> Tensor:
        self.head.train()
        self.optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=self.world.device)
        for chunk in uploaded(chunks, self.world.device, self.stream):
            features = self.features(chunk.pixels)
            with exact_float32(features.device):
                logits = self.head(features)
                loss = F.cross_entropy(logits, chunk.labels.to(logits.device), reduction="sum") / size
                loss.backward()
            total += loss.detach()
        if self.world.ranks > 1:
            for parameter in self.head.parameters():
                # A process may have no chunk.
                parameter.grad = self.world.sum(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
        self.head.norm.update_running_stats(self.world)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step, group["peak"])
        self.optimizer.step()
        return total

    def features(self, pixels: Tensor) -> Tensor:
        """The head's input; the encoder gets no gradient."""
        parts = pixels.to(self.world.device).split(self.batch)
        together = len(parts[0])
        with memory_advice(f"a pass over {together} images", batch_remedy(together)):
            return torch.cat([self.inputs(self.encoder, part) for part in parts])

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of a batch for scores."""
        features = self.features(pixels)
        with exact_float32(features.device):
            outputs: Tensor = self.head.eval()(features)
            return outputs

    def _rate(self, step: int, peak: float) -> float:
        return learning_rate(
            step, self.schedule.steps, self.schedule.epochs, warmup_epochs=self.warmup_epochs, lr=peak, min_lr=0.0
        )

    def rate(self, step: int) -> float:
        return self._rate(step, self.optimizer.param_groups[0]["peak"])

    def validates(self, epoch: int) -> bool:
        return False

    def validate(self, epoch: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
