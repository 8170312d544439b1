"""Mask R-CNN and Cascade Mask R-CNN on the pyramid of a vision transformer.

Feature pyramid, region proposals and heads are torchvision's. The stages (CAE's configuration: heads of four
convolutions and one linear layer, a GIoU loss) and the cascade are ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    FeaturePyramidNetwork,
    batched_nms,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cae2pipe.config.dense import DetectSettings
from cae2pipe.dense.boxes import Weights, decode_boxes, match_boxes, sample_proposals
from cae2pipe.dense.pooling import BoxPool
from cae2pipe.dense.pyramid import Pyramid
from cae2pipe.runtime.device import exact_float32

CHANNELS = 256
MASK = 28
"""Side of predicted masks in pixels."""
ANCHORS = ((32,), (64,), (128,), (256,), (512,))
SMALLEST = 1e-2
"""Minimum side of a detected box in pixels."""


class L1Proposals(RegionProposalNetwork):
    """torchvision's region proposals with an L1 box loss (CAE's configuration)."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(drawn).nonzero().flatten() for drawn in self.fg_bg_sampler(labels))
        chosen = torch.cat([positive, negative])
        truth, deltas = torch.cat(labels), torch.cat(regression_targets)
        boxes = F.l1_loss(pred_bbox_deltas[positive].float(), deltas[positive], reduction="sum") / max(1, len(chosen))
        scores = objectness.flatten()[chosen].float()
        return F.binary_cross_entropy_with_logits(scores, truth[chosen]), boxes


class StrideAnchors(AnchorGenerator):
    """torchvision's anchors at multiples of the maps' ``strides``. Its own multiples are quotients of sizes: less than
    64 pixels on the last map if the one before has an odd number of cells."""

    def __init__(self, strides: Sequence[float]):
        super().__init__(ANCHORS, ((0.5, 1.0, 2.0),) * len(ANCHORS))
        self.strides = tuple(strides)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: Any) -> list[Tensor]:
        """All anchors (N, 4) of each map. ``strides``, torchvision's, are ignored."""
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])
        return anchors


class ExactHead(RPNHead):
    """torchvision's head of region proposals, with float32 objectness and deltas even under autocast. In bfloat16 a
    coordinate above 512 pixels is a multiple of 4, and proposals would be suppressed on that grid.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(level) for level in x]
        with exact_float32(hidden[0].device):
            return [self.cls_logits(h.float()) for h in hidden], [self.bbox_pred(h.float()) for h in hidden]


class CascadeStage(nn.Module):
    """One stage of box and mask heads.

    Args:
        classes: without the background, which is class 0. agnostic: one box for all classes. iou: minimum IoU of a
        positive proposal. weights: of the box coding.
    """

    def __init__(self, classes: int, agnostic: bool, iou: float, *, weights: Weights):
        super().__init__()
        self.agnostic, self.iou, self.weights = agnostic, iou, weights
        self.box_head = FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [1024], norm_layer=nn.BatchNorm2d)
        self.predictor = FastRCNNPredictor(1024, classes + 1)
        if agnostic:
            self.predictor.bbox_pred = nn.Linear(1024, 4)
        nn.init.normal_(self.predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.predictor.bbox_pred.weight, std=0.001)
        for layer in (self.predictor.cls_score, self.predictor.bbox_pred):
            nn.init.zeros_(layer.bias)
        self.mask_head = MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1)
        self.mask_predictor = MaskRCNNPredictor(CHANNELS, CHANNELS, classes + 1)

    def boxes_and_scores(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (P, 1 + classes) and deltas (P, boxes, 4), float32."""
        hidden = self.box_head(pooled)
        with exact_float32(hidden.device):
            logits, deltas = self.predictor(hidden.float())
        return logits, deltas.unflatten(1, (-1, 4))

    def decode(self, deltas: Tensor, proposals: Tensor) -> Tensor:
        """The boxes (P, boxes, 4) after applying deltas (P, boxes, 4) to proposals (P, 4)."""
        boxes = deltas.shape[1]
        return decode_boxes(deltas.flatten(0, 1), proposals.repeat_interleave(boxes, dim=0), self.weights).view_as(
            deltas
        )

    def masks(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """Mask logits (P, 28, 28) of the given classes (P,)."""
        every = self.mask_predictor(self.mask_head(pooled)).float()
        logits: Tensor = every[torch.arange(len(every), device=every.device), classes]
        return logits


class MaskRCNN(nn.Module):
    """Detector for normalised images padded to a common size (B, 3, H, W).

    Under autocast only convolutions use its type; boxes, scores and pooled features stay float32.

    Args:
        pyramid: the encoder. classes: number of classes without the background. settings: all settings.
    """

    def __init__(self, pyramid: Pyramid, classes: int, settings: DetectSettings):
        super().__init__()
        self.settings, self.classes = settings, classes
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork([pyramid.width] * 4, CHANNELS, LastLevelMaxPool())
        keep, strides = settings.proposals, pyramid.strides
        self.rpn = L1Proposals(
            StrideAnchors([*strides, 2 * strides[-1]]),
            ExactHead(CHANNELS, 3),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * keep, "testing": keep},
            post_nms_top_n={"training": 2 * keep, "testing": keep},
            nms_thresh=0.7,
        )
        self.box_pool, self.mask_pool = BoxPool(7, strides), BoxPool(14, strides)
        stages = zip(settings.stage_iou, settings.stage_weights, strict=True)
        # Mask R-CNN has one box per class; a cascade one box for all classes, as published.
        self.stages = nn.ModuleList(
            CascadeStage(classes, settings.cascade, iou, weights=(weight, weight, weight / 2, weight / 2))
            for iou, weight in stages
        )

    def features(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.pyramid(images)
        levels: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(n), level) for n, level in enumerate(maps)))
        return OrderedDict((name, level.float()) for name, level in levels.items())

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> Any:
        """With targets, losses by name; a target has ``boxes`` (T, 4), ``labels`` (T,) from 1 and ``masks`` uint8 (T,
        H, W). Without targets, a dictionary per image: ``boxes``, ``labels``, ``scores``, and ``masks``, probabilities
        (D, 28, 28) within their boxes.

        Args:
            sizes: height and width of each image without padding.
        """
        features = self.features(images)
        listed = ImageList(images, sizes)
        proposals, losses = self.rpn(listed, features, targets)
        if targets is not None:
            return {
                **losses,
                **self.losses(features, [proposed.detach() for proposed in proposals], sizes, targets=targets),
            }
        return self.detections(features, proposals, sizes)

    def losses(
        self,
        features: OrderedDict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        *,
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Losses of all stages, each times the weight of its stage."""
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.stages, self.settings.stage_loss, strict=True)):
            assert isinstance(stage, CascadeStage)
            sampled = [
                training_sample(stage, proposed, target, settings=self.settings)
                for proposed, target in zip(proposals, targets, strict=True)
            ]
            boxes = [each.boxes for each in sampled]
            labels = torch.cat([each.labels for each in sampled])
            matched = torch.cat(
                [
                    target["boxes"][each.index] if len(target["boxes"]) else torch.zeros_like(each.boxes)
                    for each, target in zip(sampled, targets, strict=True)
                ]
            )
            logits, deltas = stage.boxes_and_scores(self.box_pool(features, boxes))
            positive = (labels > 0).nonzero().flatten()
            own = torch.cat(boxes)
            # The background has no box; the output in its position has no loss.
            decoded = stage.decode(deltas, own)[
                torch.arange(len(own), device=own.device), 0 if stage.agnostic else labels
            ]
            box_loss = generalized_box_iou_loss(decoded[positive], matched[positive], reduction="sum")
            losses[f"class{number}"] = weight * F.cross_entropy(logits, labels)
            losses[f"box{number}"] = weight * self.settings.giou * box_loss / max(1, len(own))
            losses[f"mask{number}"] = weight * self.mask_loss(stage, features, sampled, targets=targets)
            if number + 1 < len(self.stages):
                # The next stage's sample includes the true boxes anyway.
                refined = decoded.detach().split([len(each) for each in boxes])
                proposals = [
                    clipped(moved[each.proposed], size)
                    for moved, each, size in zip(refined, sampled, sizes, strict=True)
                ]
        return losses

    def mask_loss(
        self,
        stage: CascadeStage,
        features: OrderedDict[str, Tensor],
        sampled: list[Sample],
        *,
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Binary cross-entropy of the true class's mask within each positive proposal."""
        boxes = [each.boxes[each.labels > 0] for each in sampled]
        labels = torch.cat([each.labels[each.labels > 0] for each in sampled])
        logits = stage.masks(self.mask_pool(features, boxes), labels)
        if not len(labels):
            # All weights take part, so that all processes exchange the same gradients.
            return logits.sum() * 0
        truth = torch.cat(
            [
                masks_within(target["masks"][each.index[each.labels > 0]], own)
                for own, each, target in zip(boxes, sampled, targets, strict=True)
                if len(own)
            ]
        )
        return F.binary_cross_entropy_with_logits(logits, truth)

    def detections(
        self, features: OrderedDict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes of the last stage; class scores and masks are averaged over stages."""
        counts = [len(proposed) for proposed in proposals]
        scores: list[Tensor] = []
        for stage in self.stages:
            assert isinstance(stage, CascadeStage)
            logits, deltas = stage.boxes_and_scores(self.box_pool(features, proposals))
            scores.append(logits.softmax(dim=1))
            decoded = stage.decode(deltas, torch.cat(proposals))
            if stage.agnostic:
                refined = decoded[:, 0].split(counts)
                proposals = [clipped(moved, size) for moved, size in zip(refined, sizes, strict=True)]
        decoded = decoded.expand(-1, self.classes + 1, -1)
        mean = torch.stack(scores).mean(dim=0)
        picked = [
            self.pick(boxes, own, size)
            for boxes, own, size in zip(decoded.split(counts), mean.split(counts), sizes, strict=True)
        ]
        pooled = self.mask_pool(features, [each["boxes"] for each in picked])
        classes = torch.cat([each["labels"] for each in picked])
        drawn = [stage.masks(pooled, classes).sigmoid() for stage in self.stages if isinstance(stage, CascadeStage)]
        masks = torch.stack(drawn).mean(dim=0)
        for each, own in zip(picked, masks.split([len(each["boxes"]) for each in picked]), strict=True):
            each["masks"] = own
        return picked

    def pick(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """The best boxes of an image, of (P, 1 + classes, 4), after non-maximum suppression by class."""
        boxes = clip_boxes_to_image(boxes[:, 1:], size)
        extent = boxes[..., 2:] - boxes[..., :2]
        good = (scores[:, 1:] > self.settings.score) & (extent > SMALLEST).all(dim=2)
        proposal, label = good.nonzero(as_tuple=True)
        chosen, sure = boxes[proposal, label], scores[proposal, label + 1]
        kept = batched_nms(chosen, sure, label, self.settings.nms)[: self.settings.detections]
        return {"boxes": chosen[kept], "labels": label[kept] + 1, "scores": sure[kept]}


@dataclass(frozen=True)
class Sample:
    """A stage's training sample of an image: boxes (S, 4), labels (S,) with 0 for the background, the index (S,) of the
    matched true box, and which boxes were proposed, bool (S,); the others are true boxes."""

    boxes: Tensor
    labels: Tensor
    index: Tensor
    proposed: Tensor


def training_sample(
    stage: CascadeStage, proposals: Tensor, target: dict[str, Tensor], *, settings: DetectSettings
) -> Sample:
    """Proposals (P, 4) and true boxes, matched and sampled."""
    count = len(proposals)
    proposals = torch.cat([proposals, target["boxes"]])
    index, positive = match_boxes(proposals, target["boxes"], stage.iou)
    chosen = sample_proposals(positive, settings.rois, settings.positive)
    labels = torch.zeros_like(chosen)
    own = positive[chosen]
    labels[own] = target["labels"][index[chosen][own]]
    return Sample(proposals[chosen], labels, index[chosen], chosen < count)


def masks_within(masks: Tensor, boxes: Tensor) -> Tensor:
    """Masks (N, H, W) cropped to one box each (N, 4), as (N, 28, 28) of zeros and ones (mmdetection)."""
    places = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype).unsqueeze(1)
    cut: Tensor = roi_align(masks.unsqueeze(1).to(boxes.dtype), torch.cat([places, boxes], dim=1), MASK, aligned=True)
    return (cut[:, 0] >= 0.5).to(boxes.dtype)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes clipped to an image, with a minimum extent, by which the next stage divides."""
    boxes = clip_boxes_to_image(boxes, size)
    return torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 1.0)], dim=1)
