"""Vector quantisers for comparison with the latent codec: k-means codebooks of 256 codewords, one byte per code.

Both work on tokens in their principal axes; codes are stored as uint8 (parts, n, T), codebooks are not counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cae2pipe.targets.chunks import BLOCK, encode_chunk

TRAINING_TOKENS, ITERATIONS = 20_000, 8
"""Tokens and iterations of k-means for each codebook."""


def codebook(tokens: Tensor) -> Tensor:
    """256 codewords by k-means."""
    generator = torch.Generator().manual_seed(0)
    chosen = tokens[torch.randperm(len(tokens), generator=generator)[:TRAINING_TOKENS]]
    words = chosen[:256].clone()
    for _ in range(ITERATIONS):
        nearest = assigned(chosen, words)
        sums = torch.zeros_like(words).index_add_(0, nearest, chosen)
        counts = torch.bincount(nearest, minlength=256).unsqueeze(1)
        words = torch.where(counts > 0, sums / counts.clamp_min(1), words)
    return words


def assigned(tokens: Tensor, words: Tensor) -> Tensor:
    bias = words.square().sum(1) / 2
    return torch.cat([(part @ words.T - bias).argmax(1) for part in tokens.split(8192)])


Points = list[tuple[int, float]]
"""Bytes per view, and the mean cosine."""


def product(fit: Tensor, test: Tensor, mean: Tensor, basis: Tensor) -> Points:
    """Parts of equal size of the rotated token, with components distributed to equalise the products of variances."""
    dim = test.shape[2]
    fitted, rotated = (((unit - mean) @ basis).flatten(0, 1) for unit in (fit, test))
    logs = fitted.square().mean(0).log()
    points = []
    for parts in (8, 16, 24, 32, 48, 64, 96):
        dealt: list[list[int]] = [[] for _ in range(parts)]
        for component in range(dim):
            room = [part for part in dealt if len(part) < dim // parts]
            min(room, key=lambda part: sum(float(logs[c]) for c in part) if part else math.inf * -1).append(component)
        decoded, codes = torch.zeros_like(rotated), []
        for part in dealt:
            words = codebook(fitted[:, part])
            codes.append(assigned(rotated[:, part], words))
            decoded[:, part] = words[codes[-1]]
        points.append((code_bytes(codes, test), cosine_of(test, decoded, mean, basis)))
    return points


def residual(fit: Tensor, test: Tensor, mean: Tensor, basis: Tensor) -> Points:
    """Stages of whole-token codewords, each for the residual of the stages before."""
    fitted, rotated = (((unit - mean) @ basis).flatten(0, 1) for unit in (fit, test))
    generator = torch.Generator().manual_seed(1)
    left = fitted[torch.randperm(len(fitted), generator=generator)[:TRAINING_TOKENS]]
    rest, codes, points = rotated.clone(), [], []
    for stage in range(1, 33):
        words = codebook(left)
        left = left - words[assigned(left, words)]
        codes.append(assigned(rest, words))
        rest -= words[codes[-1]]
        if stage in (2, 4, 6, 8, 12, 16, 24, 32):
            points.append((code_bytes(codes, test), cosine_of(test, rotated - rest, mean, basis)))
    return points


def code_bytes(codes: list[Tensor], test: Tensor) -> int:
    """Bytes per view of the codes, (parts, n, T) uint8."""
    laid = torch.stack(codes).reshape(len(codes), *test.shape[:2]).to(torch.uint8)
    blocks = [block.contiguous().numpy() for block in laid.split(BLOCK, 1)]
    return round(sum(min(len(encode_chunk(block, level)) for level in (0, 1)) for block in blocks) / len(test))


def cosine_of(test: Tensor, decoded: Tensor, mean: Tensor, basis: Tensor) -> float:
    tokens = (decoded @ basis.T + mean).reshape(test.shape)
    return float(torch.cosine_similarity(test, tokens, dim=-1).mean())
