"""Boxes (x1, y1, x2, y2) in pixels: encoding and decoding of deltas, matching and sampling of proposals."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

Weights = tuple[float, float, float, float]

LARGEST = math.log(1000 / 16)
"""Maximum logarithm of the growth of a width or height: beyond it exp could overflow."""


def encode_boxes(truth: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """Deltas from ``boxes`` to ``truth``, both (N, 4): shifts of the centre in units of width and height, and
    logarithms of growth, each times its weight (R-CNN)."""
    x, y, w, h = _centred(boxes)
    tx, ty, tw, th = _centred(truth)
    deltas = torch.stack([(tx - x) / w, (ty - y) / h, (tw / w).log(), (th / h).log()], dim=1)
    return deltas * deltas.new_tensor(weights)


def decode_boxes(deltas: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """The boxes (N, 4) after applying ``deltas`` (N, 4) of ``encode_boxes``."""
    x, y, w, h = _centred(boxes)
    dx, dy, dw, dh = (deltas / deltas.new_tensor(weights)).unbind(1)
    x, y = x + dx * w, y + dy * h
    w, h = w * dw.clamp(max=LARGEST).exp(), h * dh.clamp(max=LARGEST).exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def match_boxes(proposals: Tensor, truth: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """For every proposal (P, 4) the index of the true box (T, 4) with the largest IoU, int64 (P,), and whether that IoU
    is at least ``threshold``, bool (P,). Without true boxes all proposals are background."""
    if not len(truth):
        none = torch.zeros(len(proposals), dtype=torch.int64, device=proposals.device)
        return none, none.bool()
    best, index = box_iou(truth, proposals).max(dim=0)
    return index, best >= threshold


def sample_proposals(positive: Tensor, count: int, share: float) -> Tensor:
    """Indices of at most ``count`` random proposals from torch's generator, positives first. At most ``share`` of them
    are positive (bool (P,))."""
    wanted = min(int(count * share), int(positive.sum()))
    negative = min(count - wanted, int((~positive).sum()))

    def drawn(which: Tensor, number: int) -> Tensor:
        places = which.nonzero().flatten()
        return places[torch.randperm(len(places), device=places.device)[:number]]

    return torch.cat([drawn(positive, wanted), drawn(~positive, negative)])
