"""BatchNorm over chunks: equal to torch's for one chunk, and independent of which process has which chunk."""

import torch
from torch import nn

from cae2pipe.evaluation.chunk_norm import ChunkNorm


def test_one_chunk_a_step_is_torchs_batchnorm():
    ours, theirs = ChunkNorm(5), nn.BatchNorm1d(5, affine=False, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = 3 * torch.randn(7, 5, generator=generator) + 1
        torch.testing.assert_close(ours.train()(x), theirs.train()(x))
        ours.update_running_stats()
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_the_order_of_chunks_does_not_matter():
    chunks = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    forward, backward = ChunkNorm(5), ChunkNorm(5)
    for a, b in zip(chunks, chunks.flip(0), strict=True):
        forward(a), backward(b)
    forward.update_running_stats(), backward.update_running_stats()
    torch.testing.assert_close(forward.running_mean, backward.running_mean)
    torch.testing.assert_close(forward.running_mean, 0.1 * chunks.mean(dim=(0, 1)))
    torch.testing.assert_close(forward.running_var, 0.9 + 0.1 * chunks.var(dim=1).mean(dim=0))
    assert not forward.seen.any()
