"""The detector: training samples of each stage, trained weights, outputs."""

from __future__ import annotations

import pytest
import timm
import torch

from cae2pipe.config.base import load
from cae2pipe.config.dense import DetectSettings
from cae2pipe.dense.pyramid import Pyramid
from cae2pipe.dense.rcnn import MASK, CascadeStage, MaskRCNN, masks_within, training_sample
from cae2pipe.models.trainable import take_any_size

KINDS = {"mask": False, "cascade": True}


def detector(cascade: bool, **over) -> MaskRCNN:
    torch.manual_seed(0)
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=64, embed_dim=24, depth=4, num_heads=2)
    take_any_size(encoder)
    settings = DetectSettings(cascade=cascade, proposals=30, rois=16, batch=2, **over)
    return MaskRCNN(Pyramid(encoder), classes=3, settings=settings)


@pytest.fixture
def batch():
    """Two images of unlike sizes, padded to 96 x 128, with two objects and one."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    targets = []
    for boxes, labels in (([[8, 8, 60, 70], [70, 20, 120, 90]], [1, 3]), ([[10, 30, 60, 60]], [2])):
        masks = torch.zeros(len(boxes), 96, 128, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "masks": masks})
    return images, [(96, 128), (80, 100)], targets


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind, batch):
    images, sizes, targets = batch
    model = detector(KINDS[kind]).train()
    losses = model(images, sizes, targets)
    stages = 3 if KINDS[kind] else 1
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg"} | {
        f"{name}{number}" for name in ("class", "box", "mask") for number in range(stages)
    }
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_objects_train_too(kind, batch):
    """After a crop there may be no objects: losses are finite, and all weights take part."""
    images, sizes, _ = batch
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 96, 128, dtype=torch.uint8),
    }
    model = detector(KINDS[kind]).train()
    losses = model(images, sizes, [none, none])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_cascade_s_stages_are_the_published_ones():
    stages = detector(True).stages
    assert [stage.iou for stage in stages] == [0.5, 0.6, 0.7]
    assert [stage.weights for stage in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert [stage.predictor.bbox_pred.out_features for stage in stages] == [4, 4, 4]
    assert DetectSettings(cascade=True).stage_loss == (1.0, 0.5, 0.25)
    (stage,) = detector(False).stages
    assert (stage.iou, stage.predictor.bbox_pred.out_features) == (0.5, 16)
    convolutions = [m for m in stage.box_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 4


def test_what_a_stage_trains_on_by_hand():
    settings = DetectSettings(rois=4, positive=0.5)
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}
    proposals = torch.tensor([[0.0, 0, 10, 6.5], [40.0, 40, 50, 50]])  # IoU 0.65 and 0; the true box comes along
    for iou, positives in ((0.5, 2), (0.7, 1)):
        found = training_sample(
            CascadeStage(3, True, iou, weights=(10, 10, 5, 5)), proposals, target, settings=settings
        )
        assert found.labels.tolist() == [2] * positives + [0] * (3 - positives)
        assert [0.0, 0.0, 10.0, 10.0] in found.boxes[found.labels > 0].tolist()
        assert (found.index[found.labels > 0] == 0).all()
        assert found.boxes[~found.proposed].tolist() == [[0.0, 0.0, 10.0, 10.0]]


def test_masks_are_cut_out_by_their_boxes():
    mask = torch.zeros(1, 60, 60, dtype=torch.uint8)
    mask[0, :31] = 1
    upper = masks_within(mask, torch.tensor([[10.0, 10, 50, 50]]))[0]
    assert upper.shape == (MASK, MASK)
    # The row of cells from 30 to 31.4 pixels is covered by more than a half.
    assert (upper[: MASK // 2 + 1] == 1).all()
    assert (upper[MASK // 2 + 1 :] == 0).all()


@torch.no_grad()
def test_training_has_twice_as_many_proposals(batch):
    images, sizes, targets = batch
    model, counts = detector(False), []
    model.rpn.register_forward_hook(lambda _, args, found: counts.append([len(boxes) for boxes in found[0]]))
    # Boxes so large and alike would suppress each other.
    model.rpn.nms_thresh = 1.1
    model.train()(images, sizes, targets)
    model.eval()(images, sizes)
    assert counts == [[60, 60], [30, 30]]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_detections_lie_within_their_images(kind, batch):
    images, sizes, _ = batch
    model = detector(KINDS[kind], score=0.0, detections=7).eval()
    for found, (height, width) in zip(model(images, sizes), sizes, strict=True):
        count = len(found["boxes"])
        assert 0 < count <= 7
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"][:, 2] <= width).all()
        assert (found["boxes"][:, 3] <= height).all()
        assert found["masks"].shape == (count, MASK, MASK)
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert set(found["labels"].tolist()) <= {1, 2, 3}
    nothing = detector(KINDS[kind], score=0.99).eval()(images, sizes)
    assert [len(found["boxes"]) for found in nothing] == [0, 0]


def is_exact(tensor: torch.Tensor) -> bool:
    """Whether it is float32 and not a rounded bfloat16 value."""
    return tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_decides_is_float32_under_autocast(kind, training, batch, backends):
    """Proposals, the outputs of each stage, scores and masks; none of them computed with TF32."""
    images, sizes, targets = batch
    model = detector(KINDS[kind], score=0.0, detections=7).train(training)
    proposed: list[torch.Tensor] = []
    pooled: list[torch.Tensor] = []
    precisions = []
    model.rpn.register_forward_hook(lambda _, args, found: proposed.extend(found[0]))
    for pool in (model.box_pool, model.mask_pool):
        pool.register_forward_pre_hook(lambda _, args: pooled.extend([*args[0].values(), *args[1]]))
    for layer in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, *(stage.predictor for stage in model.stages)):
        layer.register_forward_pre_hook(lambda *_: precisions.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images, sizes, targets if training else None)
    assert all(is_exact(boxes) for boxes in proposed)
    stages = 3 if KINDS[kind] else 1
    # Five maps each time, and the boxes of two images.
    assert len(pooled) == 7 * (2 * stages if training else stages + 1)
    assert {tensor.dtype for tensor in pooled} == {torch.float32}
    assert all(is_exact(boxes) for boxes in pooled if boxes.ndim == 2 and len(boxes) > 4)
    assert set(precisions) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"
    if training:
        assert {loss.dtype for loss in found.values()} == {torch.float32}
        return
    for each in found:
        assert is_exact(each["boxes"])
        assert is_exact(each["scores"])
        assert each["masks"].dtype == torch.float32


@torch.no_grad()
def test_positions_are_resampled_for_every_input():
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=64, embed_dim=24, depth=2, num_heads=2)
    plain = encoder.eval().forward_features(torch.ones(1, 3, 64, 64))
    take_any_size(encoder)
    torch.testing.assert_close(encoder.forward_features(torch.ones(1, 3, 64, 64)), plain)
    assert encoder.forward_features(torch.ones(1, 3, 96, 160)).shape == (1, 1 + 6 * 10, 24)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_presets_hold_the_fixed_values_of_table_12_and_one_of_each_grid(size):
    preset = load(DetectSettings, "evaluate", f"detect-{size}")
    assert preset.lr in {1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4}
    assert preset.layer_decay in {0.8, 0.85, 0.95}
    assert (preset.batch, preset.epochs, preset.drops, preset.weight_decay) == (16, 12, (8, 11), 0.05)
    assert (preset.beta1, preset.beta2, preset.drop_path, preset.min_lr) == (0.9, 0.999, 0.2, 1e-6)
    assert (min(preset.short_sides), max(preset.short_sides), preset.long_side) == (480, 800, 1333)
