"""Zero-shot classification: an image belongs to the class whose embedding has the largest cosine with its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.evaluation.features import FeatureSet
from cae2pipe.evaluation.scores import Predictions, from_scores
from cae2pipe.runtime.device import exact_float32

SCALE = 100.0
"""Factor of the cosines before the softmax that gives confidences: the largest that CLIP's training allows."""


def zeroshot_predictions(features: FeatureSet, embeddings: Tensor, device: torch.device) -> Predictions:
    """Predictions for images whose class tokens (N, W) are in the space of the class embeddings (C, W). Cosines are
    computed in float32 on the device."""
    with exact_float32(device):
        images = F.normalize(features.features["class"].to(device), dim=1)
        cosines = images @ F.normalize(embeddings.to(device).float(), dim=1).T
    return from_scores(SCALE * cosines, features.labels, features.keys)
