"""BatchNorm whose running statistics do not depend on how chunks are divided among processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.runtime.world import World


class ChunkNorm(nn.Module):
    """BatchNorm without affine over features (B, D), eps 1e-6 (released code).

    In training every chunk is normalised by its own statistics, as on a separate device. ``update_running_stats``
    updates the running statistics once per step, by the mean over the chunks since the last call.
    """

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.running_mean: Tensor
        self.running_var: Tensor
        self.seen: Tensor
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        # Sums of the chunks' means and variances, and the number of chunks.
        self.register_buffer("seen", torch.zeros(2 * dim + 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        with torch.no_grad():
            variance, mean = torch.var_mean(x.float(), dim=0)
            self.seen += torch.cat([mean, variance, torch.ones_like(mean[:1])])
        return F.batch_norm(x, None, None, training=True, eps=self.eps)

    @torch.no_grad()
    def update_running_stats(self, world: World | None = None) -> None:
        """Update the running statistics. Must be called by all processes after a step."""
        if world:
            world.sum(self.seen)
        mean, variance = (self.seen[:-1] / self.seen[-1]).chunk(2)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.seen.zero_()
