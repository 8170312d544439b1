"""Segmentation and detection on a device: steps and predictions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.dense import rcnn
from cae2pipe.dense.box_crops import BoxChunk
from cae2pipe.dense.detect import DetectLearner, build_detector
from cae2pipe.dense.segment import SegmentLearner, build_segmenter
from cae2pipe.evaluation.backbone import prepared_encoder
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.world import World
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.supervised.schedule import Chunk, full_batches
from tests.cuda.simulated import on_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BF16, FP32 = torch.bfloat16, torch.float32
PRECISIONS = {"fp32": False, "bf16": True}


POSITIONS = ["fixed", "relative", "rotary"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    """Exported encoders, by the positions that they were trained with."""
    root = tmp_path_factory.mktemp("encoders")
    for name in POSITIONS:
        torch.manual_seed(3)
        given = {} if name == "fixed" else {f"{name}_positions": True}
        export_encoder(Encoder(width=32, depth=4, heads=2, image_size=32, patch_size=8, **given), root / name)
    return {name: str(root / name) for name in POSITIONS}


def backbone(encoder: str, device: torch.device, size: int | None, relative_positions: bool) -> Normalised:
    return prepared_encoder(
        load_encoder(encoder, 0, device),
        encoder,
        image_size=size,
        layer_scale=0.1,
        drop_path=0.1,
        relative_positions=relative_positions,
    )


def check_on_device(learner: SegmentLearner | DetectLearner) -> None:
    """All weights have been trained, on the device and in float32."""
    for parameter in learner.network.parameters():
        tensors = [parameter]
        if parameter.requires_grad:
            tensors += [parameter.grad, *learner.optimizer.state[parameter].values()]
        assert {(tensor.device, tensor.dtype) for tensor in tensors} == {(CUDA, FP32)}
    assert {buffer.device for buffer in learner.network.buffers()} == {CUDA}


def segment_learner(encoder: str, device: torch.device, bf16: bool) -> SegmentLearner:
    settings = SegmentSettings(image_size=48, decoder_width=16, batch=4, chunk=2, steps=2, warmup_steps=0, stride=20)
    segmenter = build_segmenter(backbone(encoder, device, 48, True), 3, settings)
    schedule = full_batches(4, 4, 2, epochs=1, seed=0, length=2)
    world, val = World(0, 1, device), SimpleNamespace()
    return SegmentLearner(segmenter, settings, schedule, bf16=bf16, compiled=False, world=world, val=val)


@pytest.mark.parametrize(
    ("positions", "precision"), [("fixed", "fp32"), ("fixed", "bf16"), ("relative", "bf16"), ("rotary", "bf16")]
)
def test_a_step_of_segmentation(positions, precision, encoders, cuda):
    encoder = encoders[positions]
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 2, 3, 48, 48), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 3, (2, 2, 48, 48), generator=draw)
    labels[:, :, :4] = 255
    chunks = [Chunk(0, number, pixels[number], labels[number]) for number in range(2)]
    wanted = segment_learner(encoder, CPU, PRECISIONS[precision]).step(chunks, 0, 4)
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    with cuda:
        learner = segment_learner(encoder, CUDA, PRECISIONS[precision])
        chunks = [chunk.to(CUDA) for chunk in chunks]
        cuda.waits.clear()
        loss = learner.step(chunks, 0, 4)
        assert cuda.waits == []
        check_on_device(learner)
        predicted = learner.predict(image, (80, 140))
        assert (predicted.device, predicted.dtype, predicted.shape) == (CUDA, torch.int64, (80, 140))
    assert on_cpu(loss).item() == pytest.approx(wanted.item(), rel=0.05)
    # The classifier, whose labels these are, is in float32.
    assert set(cuda.products) == ({BF16, FP32} if PRECISIONS[precision] else {FP32})


def detect_learner(encoder: str, device: torch.device, bf16: bool, cascade: bool) -> DetectLearner:
    settings = DetectSettings(
        cascade=cascade, batch=4, chunk=2, proposals=20, rois=16, detections=5, score=0.01, epochs=12, warmup_steps=0
    )
    detector = build_detector(backbone(encoder, device, None, False), 2, settings)
    val = SimpleNamespace(classes=["red", "blue"])
    schedule, world = full_batches(4, 4, 2, epochs=12, seed=0), World(0, 1, device)
    return DetectLearner(detector, settings, schedule, bf16=bf16, world=world, val=val)


def box_chunk(number: int) -> BoxChunk:
    """Two images of unlike sizes; two objects on the first, and one or none on the second."""
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))

    def objects(boxes: list[list[int]], labels: list[int]) -> dict[str, Tensor]:
        masks = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        return {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels).long(), "masks": masks}

    second = objects([[10, 12, 40, 44]], [2]) if number else objects([], [])
    targets = (objects([[8, 8, 40, 44], [30, 20, 60, 60]], [1, 2]), second)
    return BoxChunk(0, number, pixels, torch.tensor([0, 1]), (), ((64, 64), (56, 48)), targets)


# torchvision's error for fake boxes, of which it cannot know how many are left.
@pytest.mark.filterwarnings("ignore:.*create_unbacked_symint:FutureWarning")
@pytest.mark.parametrize(
    ("positions", "cascade", "precision"),
    [("fixed", False, "fp32"), ("fixed", True, "bf16"), ("relative", False, "bf16"), ("rotary", False, "bf16")],
)
def test_a_step_of_detection(positions, cascade, precision, encoders, cuda, monkeypatch):
    encoder = encoders[positions]
    monkeypatch.setattr(rcnn, "CHANNELS", 16)
    bf16 = PRECISIONS[precision]
    chunks = [box_chunk(0), box_chunk(1)]
    wanted = detect_learner(encoder, CPU, bf16, cascade).step(chunks, 0, 4)
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    entry = {"id": 1, "height": 120, "width": 124}
    with cuda:
        learner = detect_learner(encoder, CUDA, bf16, cascade)
        loss = learner.step([chunk.to(CUDA) for chunk in chunks], 0, 4)
        assert (loss.device, loss.dtype) == (CUDA, FP32)
        check_on_device(learner)
        predicted = learner.detect(entry, image, (60, 62))
    assert on_cpu(loss).item() == pytest.approx(wanted.item(), rel=0.1)
    assert all(each["category_id"] in (1, 2) for each in predicted)
