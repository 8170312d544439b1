"""Settings of segmentation and detection."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from cae2pipe.config.base import Settings, added
from cae2pipe.config.evaluate import Precision, TrainedSpeed, check_chunks
from cae2pipe.config.fields import (
    Beta1,
    Beta2,
    DropPath,
    Epochs,
    Flip,
    InitialLayerScale,
    ValidateEpochs,
    WarmupSteps,
    WeightDecay,
)

REFERENCE_BATCH = 16
"""The batch that both learning rates refer to."""


class SegmentSettings(Settings):
    """UperNet on the encoder (paper, Table 11; details that it omits are from CAE's configuration)."""

    classes: int | None = Field(default=None, ge=2, le=65536)
    """Number of classes. null: from the data's classes.txt, or ADE20K's objectInfo150.txt."""
    reduce_zero: bool | None = None
    """Label 0 is ignored, and 1 is the first class, as in ADE20K. null: true if there is an objectInfo150.txt."""
    ignore: tuple[int, ...] = (255,)
    """Label values, as in the files, of ignored pixels."""
    upright: bool | None = added(None, before=None)
    """If EXIF rotates an image and the size of its labels fits both: labels belong to the image as viewers show it
    (true) or to its pixels as stored (false). null: such images are refused."""
    image_size: int = Field(default=512, ge=16, le=4096)
    """Side of training crops and of the evaluation's sliding window, in pixels."""
    scale: tuple[int, int] = (2048, 512)
    """Largest long and short side of resized images, with their aspect ratio kept."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Range of its random factor in training."""
    category_share: float = Field(default=0.75, gt=0, le=1)
    """Largest share of one class in a training crop; crops with more are redrawn, up to 10 times."""
    flip: Flip = 0.5
    distort: bool = True
    """Photometric distortion of training crops: brightness, contrast, saturation, hue, as in mmsegmentation."""
    stride: int = Field(default=341, ge=1)
    """Stride of the sliding window."""
    decoder_width: int | None = Field(default=None, ge=8, le=16384)
    """Channels of the decoder. null: the encoder's width."""
    auxiliary: float = Field(default=0.4, ge=0, le=1e3)
    """Weight of the auxiliary head's loss; 0: no auxiliary head."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the classifiers."""
    drop_path: DropPath = 0.1
    relative_positions: bool = True
    """Add a relative position bias to each block's attention, initially zero. An encoder pretrained with one keeps it
    in any case."""
    layer_scale: InitialLayerScale = 0.1
    steps: int = Field(default=160000, ge=1, le=10**9)
    """Steps of training."""
    warmup_steps: WarmupSteps = 1500
    batch: int = Field(default=16, ge=2, le=2**20)
    """Images per step, over all devices."""
    chunk: int = Field(default=2, ge=2, le=2**20)
    """Images that pass forward and backward together. Divides the batch; the number of chunks is a multiple of the
    number of processes. BatchNorm computes its statistics over one chunk on each device."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the decoder at a batch of 16; it scales linearly with the batch."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end, scaled like lr, also by layer_decay."""
    power: float = Field(default=1.0, gt=0, le=1e3)
    """Power of the polynomial decay."""
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Factor of the learning rate from the decoder to the last block, and from each block to the one before."""
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    weight_decay: WeightDecay = 0.05
    validate_epochs: ValidateEpochs = 0
    pictures: int = Field(default=8, ge=0, le=1000)
    """Val images whose prediction is drawn next to the ground truth."""
    precision: Precision = "auto"
    """Arithmetic: auto is bf16 autocast on CUDA, fp32 elsewhere. Weights are always fp32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the decoder, of the order, of all augmentation and of `random:` encoders."""
    speed: TrainedSpeed = TrainedSpeed()

    @field_validator("ignore", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _fits(self) -> SegmentSettings:
        check_chunks(self.batch, self.chunk)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps}): lower it")
        if not 16 <= min(self.scale) <= max(self.scale) <= 16384:
            raise ValueError(f"scale {self.scale} must be numbers of pixels from 16 to 16384")
        if not 0.01 <= self.scale_range[0] <= self.scale_range[1] <= 100:
            raise ValueError(f"scale_range {self.scale_range} is not a range within 0.01 to 100")
        if self.stride > self.image_size:
            raise ValueError(f"stride {self.stride} leaves gaps between windows of {self.image_size}: lower it")
        return self


class DetectSettings(Settings):
    """Mask R-CNN or Cascade Mask R-CNN on the encoder (paper, Table 12; the rest is CAE's configuration)."""

    cascade: bool = False
    """Three stages instead of one."""
    upright: bool | None = added(None, before=None)
    """If EXIF rotates an image and the size in the file fits both: boxes belong to the image as viewers show it (true)
    or to its pixels as stored (false). null: such images are refused."""
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Short sides of training images in pixels, one at random; evaluation uses the largest."""
    long_side: int = Field(default=1333, ge=16, le=8192)
    """Longest long side, in pixels."""
    crop_range: tuple[int, int] = (384, 600)
    """Smallest and largest side of a crop from an image resized to a short side of 400, 500 or 600 pixels (DETR's
    augmentation)."""
    crop: float = Field(default=0.5, ge=0, le=1)
    """Probability of such a crop, which may hold no object."""
    flip: Flip = 0.5
    proposals: int = Field(default=1000, ge=1, le=10**6)
    """Proposed regions per image; twice as many in training."""
    rois: int = Field(default=512, ge=4, le=10**6)
    """Regions per image that a stage trains on."""
    positive: float = Field(default=0.25, gt=0, le=1)
    """Largest share of them with an object."""
    giou: float = Field(default=10.0, gt=0, le=1e6)
    """Weight of the GIoU loss of boxes."""
    score: float = Field(default=0.05, ge=0, lt=1)
    """Smallest score of a reported box."""
    nms: float = Field(default=0.5, gt=0, le=1)
    """IoU above which the box with the lower score, of two of one class, is suppressed."""
    detections: int = Field(default=100, ge=1, le=10**6)
    """Largest number of reported boxes per image."""
    drop_path: DropPath = 0.2
    layer_scale: InitialLayerScale = 0.1
    epochs: Epochs = 12
    drops: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate is divided by 10."""
    warmup_steps: WarmupSteps = 1000
    batch: int = Field(default=16, ge=1, le=2**20)
    """Images per step, over all devices."""
    chunk: int = Field(default=2, ge=1, le=2**20)
    """Images that pass forward and backward together. Divides the batch; the number of chunks is a multiple of the
    number of processes."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate of everything but the encoder at a batch of 16; it scales linearly with the batch."""
    min_lr: float = added(1e-6, before=0.0, ge=0)
    """Lowest learning rate of any layer after the warm-up, scaled with the batch like lr. A layer whose rate is lower
    from the start keeps it until the end."""
    layer_decay: float = Field(default=0.8, gt=0, le=1)
    """Factor of the learning rate from the heads to the last block, and from each block to the one before."""
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    weight_decay: WeightDecay = 0.05
    validate_epochs: ValidateEpochs = 0
    pictures: int = Field(default=8, ge=0, le=1000)
    """Val images whose detections are drawn next to the ground truth."""
    precision: Precision = "auto"
    """Arithmetic of the encoder: auto is bf16 autocast on CUDA, fp32 elsewhere. Weights are always fp32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the heads, of the order, of all augmentation and sampling, and of `random:` encoders."""
    speed: TrainedSpeed = TrainedSpeed()

    @model_validator(mode="after")
    def _fits(self) -> DetectSettings:
        check_chunks(self.batch, self.chunk)
        if not self.short_sides or not 16 <= min(self.short_sides) <= max(self.short_sides) <= 8192:
            raise ValueError("short_sides must be one or more numbers of pixels from 16 to 8192")
        if not 0 < self.crop_range[0] <= self.crop_range[1] <= 8192:
            raise ValueError(f"crop_range {self.crop_range} is not a range within 1 to 8192")
        return self

    @property
    def stage_iou(self) -> tuple[float, ...]:
        """Smallest IoU of each stage's positive proposals."""
        return (0.5, 0.6, 0.7) if self.cascade else (0.5,)

    @property
    def stage_weights(self) -> tuple[float, ...]:
        """Weights of each stage's box coding: for shifts, and half of that for log-scales."""
        return (10.0, 20.0, 30.0) if self.cascade else (10.0,)

    @property
    def stage_loss(self) -> tuple[float, ...]:
        """Weights of each stage's losses."""
        return (1.0, 0.5, 0.25) if self.cascade else (1.0,)


DENSE: dict[str, type[Settings]] = {"segment": SegmentSettings, "detect": DetectSettings}
"""Evaluations on pixels and boxes by name; the names of their presets begin with it."""
