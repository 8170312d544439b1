"""Settings of evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cae2pipe.config.base import Settings, added, not_fingerprinted
from cae2pipe.config.fields import Beta1, Beta2, Epochs, Flip, LocalPath, Recipe

Feature = Literal["auto", "class", "mean"]
Precision = Literal["auto", "fp32", "bf16"]
PromptSet = Literal["openai", "simple"]


class EvaluateSpeed(Settings):
    """Settings that only change the speed."""

    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:1, ..."""
    workers: int = Field(default=-1, ge=-1, le=1024)
    """Processes that decode images; -1: one per core; 0: decode in the main process."""
    batch: int | None = Field(default=None, ge=1, le=2**20)
    """Images that pass the encoder together. null: 256 on CUDA, 64 elsewhere."""


class FeatureSettings(Settings):
    """How images become features."""

    feature: Feature = "auto"
    """class: the class token; mean: the mean of the patches; auto: the class token if it was trained by a loss."""
    image_size: int | None = Field(default=None, ge=16, le=4096)
    """Side of the crop in pixels. null: the encoder's own."""
    crop: float = Field(default=0.875, ge=0.1, le=1)
    """Ratio of the central crop's side to the resized image's shorter side, such as 224 / 256."""
    precision: Precision = "auto"
    """Arithmetic of a student: auto is bf16 autocast on CUDA, fp32 elsewhere. Teachers have their own."""


class DrawSettings(Settings):
    """Random crops for training: resized, bicubic, with a random flip."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: Flip = 0.5
    rand_augment: int = Field(default=0, ge=0, le=10)
    """Magnitude of RandAugment (two operations, deviation 0.5, increasing severity); 0: none."""
    clip: bool = added(False, before=False)
    """true: a crop is drawn once, and its sides are clipped to the image's, as MAE and the released code do for linear
    probes. false: up to ten draws until one fits the image, then the largest central crop, as timm does."""

    @model_validator(mode="after")
    def _ranges(self) -> DrawSettings:
        if not 0.001 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"draw.scale {self.scale} is not a range within 0.001 to 1")
        if not 0.01 <= self.ratio[0] <= self.ratio[1] <= 100:
            raise ValueError(f"draw.ratio {self.ratio} is not a range within 0.01 to 100")
        return self


class TrainedSpeed(EvaluateSpeed):
    """Settings that only change the speed."""

    compile: bool | None = None
    """Compile the trained model (torch.compile); not for detection. null: on CUDA only."""
    checkpoint_minutes: float = Field(default=10.0, gt=0, le=1e6)
    """Minutes between checkpoints."""
    keep: int = Field(default=2, ge=1, le=10**6)
    """Newest checkpoints kept until the end."""


class KnnSettings(Settings):
    """Weighted k nearest neighbours on frozen features, as in DINO's protocol."""

    features: FeatureSettings = FeatureSettings()
    k: tuple[int, ...] = (20, 10, 100, 200)
    """One or several numbers of neighbours. The first one gives the main score."""
    temperature: float = Field(default=0.07, gt=0, le=1e6)
    """A neighbour with cosine c has the weight exp(c / temperature)."""
    seed: int = Field(default=0, ge=0)
    """Seed of `random:` encoders."""
    speed: EvaluateSpeed = EvaluateSpeed()

    @field_validator("k", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _counts(self) -> KnnSettings:
        if not 1 <= len(self.k) <= 100 or min(self.k) < 1:
            raise ValueError("k must be 1 to 100 numbers, each at least 1")
        return self


FAST_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates that a fast linear evaluation tries, around the paper's 0.1."""


class LinearSettings(Settings):
    """A linear classifier on a frozen encoder (paper, Table 9)."""

    recipe: Recipe = added("paper", before="paper")
    features: FeatureSettings = FeatureSettings()
    draw: DrawSettings = DrawSettings(clip=True)
    cached_crops: int = Field(default=0, ge=0, le=1000)
    """0: new crops of every image in every epoch, as published. n: features of n crops per image are computed once,
    the central one and n - 1 random ones, and epochs use them in turn."""
    epochs: Epochs = 90
    warmup_epochs: float = Field(default=10, ge=0, le=1e6)
    """Epochs of linear warm-up, by step."""
    batch: int = Field(default=16384, ge=2, le=2**24)
    """Images per step. Sets below 16 batches use smaller ones, down to 64, so that an epoch has up to 16 steps."""
    chunk: int = Field(default=256, ge=2, le=2**24)
    """Images per BatchNorm statistic, like one device's share of a batch (2048 or 1024 images in the released scripts).
    Cached crops are normalised over the whole batch."""
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate of LARS at a batch of 256; it scales linearly with `batch` as set here."""
    sweep: tuple[float, ...] = ()
    """With cached crops: learning rates, scaled like `lr`, to train with in parallel. The best one on held-out training
    images is used instead of `lr`. Empty: `lr` is used."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of each training class that a sweep holds out."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """LARS's momentum."""
    seed: int = Field(default=0, ge=0)
    """Seed of the head, of the order, of crops and of `random:` encoders."""
    speed: TrainedSpeed = TrainedSpeed()

    @model_validator(mode="after")
    def _fits(self) -> LinearSettings:
        if any(not 0 < lr <= 1e4 for lr in self.sweep):
            raise ValueError("sweep must be learning rates above 0 and at most 1e4")
        if self.sweep and not self.cached_crops:
            raise ValueError("a sweep needs cached crops: set cached_crops to 1 or more, or give --fast")
        check_warmup(self.warmup_epochs, self.epochs)
        return self


class AttentiveSettings(Settings):
    """One cross-attention block and a linear classifier on a frozen encoder's tokens (CAE's attentive probe)."""

    features: FeatureSettings = FeatureSettings()
    draw: DrawSettings = DrawSettings()
    heads: int | None = Field(default=None, ge=1, le=16384)
    """Heads of the cross-attention. null: the student's own; for a teacher's tokens one per 64 dimensions."""
    eps: float = added(1e-5, before=1e-6, gt=0, le=1)
    """BatchNorm's epsilon (released code)."""
    epochs: Epochs = 90
    warmup_epochs: float = Field(default=10, ge=0, le=1e6)
    """Epochs of linear warm-up, by step."""
    batch: int = Field(default=8192, ge=2, le=2**24)
    """Images per step. Sets below 16 batches use smaller ones, down to 64, so that an epoch has up to 16 steps."""
    chunk: int = Field(default=256, ge=2, le=2**24)
    """Images per BatchNorm statistic, like one device's share of a batch (released code)."""
    lr: float = Field(default=0.4, gt=0)
    """Peak learning rate of SGD with Nesterov momentum at a batch of 8192; it scales linearly with the actual batch."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum."""
    seed: int = Field(default=0, ge=0)
    """Seed of the head, of the order, of crops and of `random:` encoders."""
    speed: TrainedSpeed = TrainedSpeed()

    @model_validator(mode="after")
    def _fits(self) -> AttentiveSettings:
        check_warmup(self.warmup_epochs, self.epochs)
        return self


class FinetuneSettings(Settings):
    """The whole encoder trained as a classifier (paper, Table 10)."""

    recipe: Recipe = "paper"
    image_size: int | None = Field(default=None, ge=16, le=4096)
    """Side of the input in pixels. null: the encoder's own. For another size, position embeddings are resampled."""
    crop: float = Field(default=0.875, ge=0.1, le=1)
    """Ratio of the central crop's side to the resized image's shorter side in evaluation, such as 224 / 256."""
    draw: DrawSettings = DrawSettings(rand_augment=9)
    erase: float = Field(default=0.25, ge=0, le=1)
    """Probability of random erasing, with noise (released code; not in the paper)."""
    mixup: float = Field(default=0.8, ge=0, le=1e3)
    """Mixup's alpha; 0: none."""
    cutmix: float = Field(default=1.0, ge=0, le=1e3)
    """CutMix's alpha; 0: none. With both, each chunk uses one of them, with equal probability."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Largest drop path rate; rates rise linearly from 0 over the depth."""
    relative_positions: bool = True
    """Add a relative position bias to each block's attention, initially zero (released code). An encoder pretrained
    with one keeps it in any case."""
    layer_scale: float | None = Field(default=0.1, gt=0, le=1e3)
    """LayerScale for an encoder without it, as older versions of cae2pipe exported them: the weights before it are
    divided by it. null: no LayerScale is added. An encoder with LayerScale keeps its learnt values."""
    head_scale: float = Field(default=0.001, gt=0, le=1e3)
    """Factor of the classifier's initial weights (released code)."""
    epochs: Epochs = 100
    warmup_epochs: float = Field(default=5, ge=0, le=1e6)
    """Epochs of linear warm-up from 0, by step."""
    batch: int = Field(default=1024, ge=2, le=2**20)
    """Images per step, over all devices."""
    chunk: int = Field(default=128, ge=2, le=2**20)
    """Images that pass forward and backward together, and that share one Mixup draw. Divides the batch; the number of
    chunks is a multiple of the number of processes."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate of the classifier at a batch of 1024; it scales linearly with the batch."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end of the cosine, scaled like lr."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Factor of the learning rate from each block to the one before it."""
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    weight_decay: float = Field(default=0.05, ge=0, le=1e4)
    """Decay of weights with two or more dimensions, except the class token and position embeddings."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; null: no clipping (released code)."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is evaluated instead of them; 0: none."""
    validate_epochs: int = Field(default=1, ge=1, le=10**6)
    """Epochs between evaluations on the val images; the last epoch is always evaluated."""
    precision: Precision = "auto"
    """Arithmetic: auto is bf16 autocast on CUDA, fp32 elsewhere. Weights are always fp32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the classifier, of the order, of all augmentation and of `random:` encoders."""
    speed: TrainedSpeed = TrainedSpeed()

    @model_validator(mode="after")
    def _fits(self) -> FinetuneSettings:
        check_chunks(self.batch, self.chunk)
        if self.chunk % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"Mixup and CutMix need an even chunk, not {self.chunk}")
        check_warmup(self.warmup_epochs, self.epochs)
        return self


class ZeroshotSettings(Settings):
    """Classification by the nearest class embedding in the teacher's space, without training."""

    features: FeatureSettings = FeatureSettings()
    classes: LocalPath | None = not_fingerprinted(None)
    """A safetensors file with class embeddings. null: `text` is needed."""
    text: str | None = not_fingerprinted(None, min_length=1)
    """The text tower that embeds the classes: open_clip:NAME/TAG, or open_clip:NAME@FILE with local weights."""
    teacher: str | None = not_fingerprinted(None, min_length=1)
    """Of a run of several teachers: the label of the one whose head is used. null: the first that was trained with
    texts, as CLIP, else the first."""
    names: LocalPath | None = not_fingerprinted(None)
    """A text file with a line `CLASS NAME, NAME, ...` for each class. null: the names of the class folders."""
    prompts: PromptSet | tuple[str, ...] = "openai"
    """Prompts, each with {} in place of a name: CLIP's 80 (openai), its best 7 (simple), or a list. The embeddings of
    all prompts and names of a class are averaged."""
    speed: EvaluateSpeed = EvaluateSpeed()

    @model_validator(mode="after")
    def _fits(self) -> ZeroshotSettings:
        if self.features.feature == "mean":
            raise ValueError("zero-shot classification uses the class token: set features.feature=auto")
        if self.classes is not None and self.text is not None:
            raise ValueError("class embeddings are given twice: give classes (--classes) or text (--text)")
        if self.names is not None and self.classes is not None:
            raise ValueError("names are for a text tower: omit them (--names), or give text (--text)")
        if isinstance(self.prompts, tuple) and not (self.prompts and all("{}" in prompt for prompt in self.prompts)):
            raise ValueError("prompts must each contain {} in place of the class's name")
        return self


def check_chunks(batch: int, chunk: int) -> None:
    """Raise ValueError if a batch is not a whole number of chunks."""
    if batch % chunk:
        near = max(d for d in range(1, min(chunk, batch) + 1) if batch % d == 0)
        raise ValueError(f"batch {batch} is not divisible by chunk {chunk}: set chunk={near}")


def check_warmup(warmup_epochs: float, epochs: int) -> None:
    """Raise ValueError if the warm-up takes the whole training."""
    if warmup_epochs >= epochs:
        raise ValueError(f"warmup_epochs ({warmup_epochs:g}) must be less than epochs ({epochs}): lower it")


AnySettings = KnnSettings | LinearSettings | AttentiveSettings | FinetuneSettings
EVALUATIONS: dict[str, type[AnySettings] | type[ZeroshotSettings]] = {
    "knn": KnnSettings,
    "linear": LinearSettings,
    "attentive": AttentiveSettings,
    "finetune": FinetuneSettings,
    "zeroshot": ZeroshotSettings,
}
"""Evaluations by name, which is also the name of their preset, or its beginning."""
