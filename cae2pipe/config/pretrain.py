"""Settings of stage 2: the student, the masks, the loss, the optimiser, the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cae2pipe.config.base import Settings, added, not_fingerprinted
from cae2pipe.config.fields import Beta1, LocalPath, PathOrUrl, Recipe


class ModelSettings(Settings):
    """The student (paper, section 2.2 and appendix B.1)."""

    width: int = Field(default=768, ge=8, le=16384)
    """Width of the encoder's tokens."""
    depth: int = Field(default=12, ge=1, le=256)
    """Encoder blocks."""
    heads: int = Field(default=12, ge=1, le=1024)
    """Attention heads of the encoder. Small has 6 in the paper, 12 in the released code."""
    image_size: int = Field(default=224, ge=16, le=4096)
    """Side of the student's input in pixels, at most that of the stored views, which are reduced to it when loaded."""
    patch_size: int = Field(default=16, ge=1, le=1024)
    """Side of a patch in pixels."""
    relative_positions: bool = added(False, before=False)
    """Besides the fixed positions, a learnt bias by relative position in each attention of encoder and regressor, zero
    at first (paper, B.3, for detection). It needs memory for a bias of every head and pair of visible tokens."""
    rotary_positions: bool = added(False, before=False)
    """Besides the fixed positions, rotary ones in each attention of encoder and regressor, as in EVA-02 (paper, B.3,
    for detection). Not together with relative ones: no model of timm has both."""
    layer_scale: float = Field(default=0.1, gt=0, le=1e3)
    """Initial LayerScale of the encoder's blocks (1e-5 for Large)."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Largest drop path rate; rates rise linearly from 0 over the depth, in the encoder and in the regressor."""
    predictor_depth: int = Field(default=4, ge=0, le=256)
    """Blocks of the module that predicts the masked patches: the regressor of CAE v2 and CAE, or MAE's decoder. 0: only
    the visible loss (paper, Table 4)."""
    predictor_width: int = Field(default=768, ge=8, le=16384)
    """Its width. If that differs from the encoder's, a Linear and a LayerNorm are in between."""
    predictor_heads: int = Field(default=12, ge=1, le=1024)
    """Its attention heads. Large has 16 in the paper, 12 of 85 features in the released code."""
    predictor_layer_scale: float = Field(default=0.1, gt=0, le=1e3)
    """Initial LayerScale of its blocks."""
    predictor_norm: bool = added(False, before=False)
    """A final LayerNorm behind the regressor, in front of what reads it, as in CAE. Decoders always have one."""
    head: Literal["fc-ln", "ln-fc"] = "fc-ln"
    """Order of the head shared by encoder and regressor: paper fc-ln, released code ln-fc."""
    init: PathOrUrl | None = not_fingerprinted(None, min_length=1)
    """What the encoder starts from, instead of random weights: a run, an encoder.safetensors, timm:NAME or
    timm:NAME@FILE of a plain ViT of its size, ... as `cae2pipe evaluate` takes them. Positions are resampled."""

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        if self.predictor_depth and self.predictor_width < self.predictor_heads:
            raise ValueError(
                f"model.predictor_width {self.predictor_width} is less than model.predictor_heads "
                f"{self.predictor_heads}: set model.predictor_heads to at most {self.predictor_width}"
            )
        if self.grid > 256:
            raise ValueError(
                f"model.image_size {self.image_size} with model.patch_size {self.patch_size} gives {self.grid} patches "
                "per side: set model.patch_size so that it is at most 256"
            )
        weights = 12 * (self.depth * self.width**2 + self.predictor_depth * self.predictor_width**2)
        if weights > 10**11:
            raise ValueError(
                f"the student would have {weights / 1e9:.0f} billion weights: lower model.width or model.depth"
            )
        if self.rotary_positions:
            if self.relative_positions:
                raise ValueError("no model of timm has relative and rotary positions: set one of them to false")
            heads = {
                "model.heads": self.width // self.heads,
                "model.predictor_heads": self.predictor_width // self.predictor_heads if self.predictor_depth else 0,
            }
            for name, features in heads.items():
                if features % 4:
                    raise ValueError(f"{name}: rotary positions need heads of a multiple of 4 features, not {features}")
        if self.width % 4 or self.predictor_width % 4:
            raise ValueError("widths must be multiples of 4, for sin-cos positions")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


class MaskSettings(Settings):
    """Which patches are hidden (paper, section 2.3, Table 5)."""

    strategy: Literal["block", "random", "attention"] = "block"
    """block: BEiT's random blocks; random: independent patches; attention: patches that the teacher's class token
    attends to are more likely to stay visible (MILAN); the target set must hold attention (plain ViT teachers)."""
    ratio: float = Field(default=0.5, gt=0, lt=1)
    """Share of patches masked."""
    count: int | None = Field(default=None, ge=1, le=65536)
    """Exact number of masked patches. null: ratio x patches, rounded (30 / 49 / 98 / 118 in the released code)."""
    repeat: int = Field(default=1, ge=1, le=1024)
    """Masks per loaded view and step. A step then loads data.batch / repeat views, for when reading is the bottleneck;
    an epoch has `repeat` times as many steps, so divide epochs by it for the same work."""


TeacherWeight = Annotated[float, Field(gt=0, le=1e6)]


class LossSettings(Settings):
    """Visible and masked latent alignment (paper, equations 1 and 2)."""

    kind: Literal["cosine", "mse", "smooth_l1"] = "cosine"
    """Distance between predicted and target latents (paper Table 3)."""
    beta: float = added(1.0, before=1.0, gt=0, le=1e3)
    """The difference at which smooth_l1 turns from quadratic to linear (dBOT: 2)."""
    target: Literal["as_is", "layer_norm", "pixels"] = "as_is"
    """as_is: the teacher's latents; layer_norm: the same, with each token normalised over its channels to mean 0 and
    variance 1 (FD, MaskDistill, dBOT); pixels: each patch's own pixels, normalised alike, without a teacher (MAE)."""
    reduction: Literal["two_means", "one_mean"] = "two_means"
    """two_means: mean over visible plus mean over masked tokens; one_mean: one mean over all of them."""
    visible: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the visible tokens."""
    masked: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the masked tokens."""
    class_token: Literal["visible", "masked", "none"] = added("visible", before="visible")
    """Among which tokens the class token counts, where the teacher has one: visible, as in the released code; masked
    (dBOT); none: it has no loss, as in equation 2, and nothing else trains it to describe the image."""
    summary: bool | None = added(None, before=None)
    """Whether the student's class token is aligned, as one more visible token and through a head of its own, with the
    teacher's own output for the whole image. null: if the target set has one (a summary), and no class token."""

    teachers: dict[str, TeacherWeight] | None = added(None, before=None)
    """With several target sets: the weight of each teacher's loss, by its label, as `cae2pipe inspect` shows it. 1 for
    those without one."""
    drop_teachers: float = added(0.0, before=0.0, ge=0, le=1)
    """With several target sets: for every image the teacher with the largest loss counts, and each other one is dropped
    with this probability (UNIC)."""

    @model_validator(mode="after")
    def _some(self) -> LossSettings:
        if self.visible == self.masked == 0:
            raise ValueError("loss.visible and loss.masked are both 0: set one of them above 0")
        if self.summary and (self.target == "pixels" or not self.visible):
            raise ValueError(
                "loss.summary is one of the visible latents: set loss.summary=false"
                + ("" if self.target == "pixels" else ", or loss.visible above 0")
            )
        return self

    @property
    def aligns_class_token(self) -> bool:
        """Whether a class token of the teacher is a target."""
        weight = {"visible": self.visible, "masked": self.masked, "none": 0.0}[self.class_token]
        return bool(weight and self.target != "pixels")

    def aligns_summary(self, class_token: bool, *, stored: bool) -> bool:
        """Whether a summary is a target. ``class_token``: the teacher has one. ``stored``: a summary is stored."""
        wanted = not class_token if self.summary is None else self.summary
        return bool(stored and wanted and self.visible and self.target != "pixels")


class OptimizerSettings(Settings):
    """AdamW and its schedule (paper Table 8)."""

    lr: float = Field(default=1.5e-3, gt=0)
    """Peak learning rate at a batch of 2048."""
    scale_lr: bool = True
    """Scale lr and min_lr linearly with the batch; false: use them unscaled."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the end of the cosine, scaled like lr."""
    beta1: Beta1 = 0.9
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """AdamW's second momentum: paper 0.98, released code 0.999."""
    weight_decay: float = Field(default=0.05, ge=0, le=1e4)
    """Decay of weights with two or more dimensions, and of the class and mask tokens."""
    clip: float = Field(default=3.0, gt=0)
    """Largest norm of the gradient."""
    warmup_epochs: float = Field(default=10, ge=0, le=1e6)
    """Epochs of linear warm-up from 0, by step."""


class DataSettings(Settings):
    """The order of samples."""

    batch: int = Field(default=2048, ge=1, le=2**20)
    """Images per step, over all devices."""
    views: int | None = Field(default=None, ge=1, le=10**6)
    """Number of stored views per image that are trained on, from the first. null: all."""
    streams: int = Field(default=64, ge=1, le=2**20)
    """Streams that the epoch is split into. Divides the batch; a multiple of the number of processes."""
    window: int = Field(default=4, ge=1, le=2**20)
    """Blocks of 64 samples that a stream mixes at any time. It has about two more in memory."""
    last_batch: Literal["pad", "drop"] = "pad"
    """pad: the last batch is padded with samples of weight 0; drop: it is omitted (released code)."""
    decode: Literal["workers", "device"] = "workers"
    """Where JPEGs are decoded and replayed views cropped: in the workers, as for the teacher; or on the device
    (torchcodec; on CUDA by nvJPEG, whose pixels differ slightly), if there are too few CPU cores."""
    pixels: PathOrUrl | None = not_fingerprinted(None)
    """The folder (or URL) with the pixels of a target set by reference: the set that it was made from. null: the set
    holds them itself, or is TARGETS/teachers/LABEL."""

    @model_validator(mode="after")
    def _divides(self) -> DataSettings:
        if self.batch % self.streams:
            raise ValueError(
                f"data.batch ({self.batch}) is not divisible by data.streams ({self.streams}): "
                f"set data.streams to {_divisor(self.batch, self.streams)}, or data.batch to a multiple of it"
            )
        return self


class TrainSpeed(Settings):
    """Settings that only change the speed; results differ at most by the order of floating-point sums."""

    device: str = "auto"
    """Device of the student: auto, cpu, cuda, cuda:1, ... Under torchrun each process uses its own."""
    accumulation: int = Field(default=1, ge=1, le=2**20)
    """Forward and backward passes that a process's share of the batch is split into, to save memory."""
    recompute: bool = False
    """Keep only the inputs of each block and recompute the rest in the backward pass, to save much memory."""
    compile: bool | None = None
    """Compile the student (torch.compile). null: on CUDA only."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes train: ddp keeps all weights in each of them, fsdp shards weights and optimizer (FSDP2)."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, so that CUDA runs are reproducible bit for bit. CPU runs always are."""
    workers: int = Field(default=-1, ge=-1, le=1024)
    """Processes that read and decode blocks; -1: one per core, shared among the ranks of a machine; 0: read in
    the main process."""
    cache: LocalPath | None = None
    """A local folder that caches blocks of a remote target set for later epochs. None: no cache."""
    cache_gb: float = Field(default=100.0, gt=0, le=1e9)
    """Largest size of the cache in gigabytes; blocks that were read first are kept."""
    checkpoint_minutes: float = Field(default=10.0, gt=0, le=1e6)
    """Minutes between checkpoints."""
    keep: int = Field(default=2, ge=1, le=10**6)
    """Newest checkpoints kept."""
    keep_epochs: int = Field(default=0, ge=0, le=10**6)
    """Epochs between checkpoints that are kept permanently; 0: none."""
    peak_tflops: float | None = Field(default=None, gt=0, le=1e9)
    """The device's peak for MFU, in 10^12 operations per second. null: a known value for the device."""


class ProbeSettings(Settings):
    """Measurements of the student during training. They do not change what is trained."""

    images: LocalPath | None = None
    """A folder with train and val, as for `cae2pipe evaluate`: accuracy of nearest neighbours. null: none."""
    targets: PathOrUrl | list[PathOrUrl] | None = None
    """A target set of held-out images, made with the same teacher: loss and cosines on its views. A list, if there are
    several teachers: a set of each, over the same views. null: none."""
    pixels: PathOrUrl | None = None
    """The folder (or URL) with the pixels of these views, if their set is by reference. null: as for data.pixels."""
    every: int = Field(default=10, ge=1, le=10**6)
    """Epochs between measurements; there is always one after the last epoch."""
    k: int = Field(default=20, ge=1, le=10**6)
    """Number of neighbours, or the number of training images if that is less."""
    blocks: int = Field(default=64, ge=1, le=10**6)
    """Largest number of blocks of 64 held-out views."""
    batch: int | None = Field(default=None, ge=1, le=2**20)
    """Images that pass the student together. null: 256 on CUDA, 64 elsewhere."""
    memory_gb: float = Field(default=2.0, ge=0, le=1e6)
    """Gigabytes of each process for decoded images, which are then read only once; more are read every time."""

    @property
    def on(self) -> bool:
        """Whether anything is measured."""
        return self.images is not None or bool(self.sets)

    @property
    def sets(self) -> list[str]:
        """The target sets of held-out images."""
        return [self.targets] if isinstance(self.targets, str) else self.targets or []


class PretrainSettings(Settings):
    """All settings of `cae2pipe pretrain`."""

    recipe: Recipe = "paper"
    method: str = "caev2"
    """The pretraining method: caev2, cae, mvp, mae, milan or fd. Presets of other methods, such as mvp, set the
    matching loss and masks."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order, masks and drop path."""
    targets: Literal["cached", "online"] = "cached"
    """cached: latents from the target set; online: the teacher runs in every step, as published."""
    views: Literal["stored", "fresh"] = "stored"
    """stored: the target set's views; fresh (only with online targets): new crops of the originals in every epoch."""
    epochs: int = Field(default=300, ge=1, le=10**6)
    """Passes over the data. One pass uses one view of every image."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the student: auto is bf16 autocast on CUDA, fp32 elsewhere. Weights and loss are always fp32."""
    model: ModelSettings = ModelSettings()
    mask: MaskSettings = MaskSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    data: DataSettings = DataSettings()
    stop_after: int | None = not_fingerprinted(None, ge=1, le=10**12)
    """Stop after this many steps, as if interrupted; rerun the same command to resume. For trials."""
    originals: PathOrUrl | None = not_fingerprinted(None)
    """The shard set (folder or URL) that fresh views are cropped from. null: the one inside the target set."""
    teacher_weights: LocalPath | dict[str, LocalPath] | None = not_fingerprinted(None)
    """The online teacher's weights, if they came from a local file: target sets do not store paths. Of several teachers
    the files by label."""
    track: list[Literal["tensorboard", "wandb"]] = not_fingerprinted([])
    """Also write metrics to these trackers."""
    probe: ProbeSettings = not_fingerprinted(ProbeSettings())
    speed: TrainSpeed = TrainSpeed()

    @model_validator(mode="after")
    def _counts(self) -> PretrainSettings:
        patches = self.model.grid**2
        if not 0 < self.masked_patches < patches:
            raise ValueError(
                f"mask.ratio {self.mask.ratio} masks {self.masked_patches} of {patches} patches: "
                "at least one must be masked and one visible; change mask.ratio"
            )
        if self.data.batch % self.mask.repeat:
            raise ValueError(
                f"data.batch ({self.data.batch}) is not divisible by mask.repeat ({self.mask.repeat}): "
                f"set mask.repeat to {_divisor(self.data.batch, self.mask.repeat)}"
            )
        if self.loaded_batch % self.data.streams:
            raise ValueError(
                f"with mask.repeat {self.mask.repeat} a step loads {self.loaded_batch} views, not divisible by "
                f"data.streams ({self.data.streams}): set data.streams to "
                f"{_divisor(self.loaded_batch, self.data.streams)}"
            )
        if self.views == "fresh" and self.targets == "cached":
            raise ValueError("fresh views have no cached targets: set targets=online, or views=stored")
        if self.views == "fresh" and self.data.decode == "device":
            raise ValueError("fresh views are cropped by the workers: set data.decode=workers")
        if self.views == "fresh" and self.mask.strategy == "attention":
            raise ValueError("fresh views have no attention: set mask.strategy=block, or views=stored")
        if self.targets == "online" and self.loss.target == "pixels":
            raise ValueError("pixel targets have no teacher: set targets=cached, or loss.target=as_is")
        if self.model.predictor_depth == 0 and self.loss.visible == 0:
            raise ValueError("with model.predictor_depth 0 there is no masked loss: set loss.visible above 0")
        if self.model.predictor_depth == 0 and self.loss.class_token == "masked":
            raise ValueError("with model.predictor_depth 0 there is no masked loss: set loss.class_token=visible")
        if self.optimizer.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs ({self.optimizer.warmup_epochs}) must be less than epochs ({self.epochs}): "
                "lower it"
            )
        return self

    def weights_of(self, label: str) -> Path | None:
        """The file of a teacher's weights, if one is given."""
        return self.teacher_weights.get(label) if isinstance(self.teacher_weights, dict) else self.teacher_weights

    @property
    def masked_patches(self) -> int:
        """Masked patches per image."""
        return self.mask.count or round(self.mask.ratio * self.model.grid**2)

    @property
    def loaded_batch(self) -> int:
        """Views loaded per step, over all devices; each is trained with `mask.repeat` masks."""
        return self.data.batch // self.mask.repeat


def _divisor(batch: int, near: int) -> int:
    return max(d for d in range(1, min(near, batch) + 1) if batch % d == 0)
