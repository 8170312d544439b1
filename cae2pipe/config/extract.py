"""Settings of stage 1: shards, teacher, views, codec."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cae2pipe.artifacts.manifest_targets import CodecIdentity
from cae2pipe.config.base import Settings, added, not_fingerprinted
from cae2pipe.config.fields import LocalPath

ENLARGED = 1.28
"""Largest enlargement of a crop of a kept image: that of short side 320 for views of 224 pixels."""

SHOWINGS = 19
"""Epochs for which one view of an image may be shown. Measured by benchmarks/views.py over 200 epochs: the loss on
other images is 0.846 with 16 views (each shown 12.5 times) and with 32, 0.853 with 8, 0.868 with 4, 0.967 with one."""


def recommend_views(epochs: int) -> int:
    """Views of each image to store for pretraining over ``epochs``, at least 1. An epoch shows one view of each image,
    and each view may be shown ``SHOWINGS`` times."""
    return max(1, math.ceil(epochs / SHOWINGS))


Precision = Literal["auto", "fp32", "bf16", "fp16"]
GridSide = Annotated[int, Field(ge=1, le=1024)]
Licence = Annotated[str, Field(min_length=1, max_length=200)]
"""Free text, preferably an SPDX identifier."""


class ShardSpeed(Settings):
    """Settings that only change the speed."""

    workers: int = Field(default=-1, ge=-1, le=1024)
    """Processes that read and check images; -1: one per core."""


class ShardSettings(Settings):
    """How images are packed into tars."""

    seed: int = Field(default=0, ge=0)
    """Seed of the shuffle over the whole data set."""
    samples: int = Field(default=1024, ge=1, le=10**6)
    """Images per tar. Multiples of 64 fill the blocks of the target set."""
    licence: Licence | None = not_fingerprinted(None)
    """Licence of the images, for manifests and model cards. null: unknown."""
    speed: ShardSpeed = ShardSpeed()


class TeacherSettings(Settings):
    """The frozen model whose patch latents are the targets."""

    kind: Literal["open_clip", "timm"]
    """The library that builds the tower."""
    name: str
    """The model's name in that library, e.g. ViT-B-16-quickgelu; for timm also hf-hub:ORG/NAME, a hub repository with
    timm's config.json, or local-dir:PATH, a folder with it."""
    pretrained: str | None = None
    """The pretrained tag, e.g. openai; unused when `weights` names a file."""
    weights: LocalPath | None = not_fingerprinted(None)
    """A local weights file (safetensors, or a torch file of tensors). Its content enters the fingerprint."""
    licence: Licence | None = not_fingerprinted(None)
    """Licence of the weights, for manifests and model cards. null: what timm or the hub declares, else unknown."""
    vision_cfg: dict[str, Any] | None = None
    """open_clip only: the tower's configuration, for weights that fit no named model."""
    embed_dim: int | None = Field(default=None, ge=1, le=65536)
    """open_clip only, with `vision_cfg`: the projection's width."""
    quick_gelu: bool | None = None
    """open_clip only: force QuickGELU on or off. None: as in the named model."""
    model_args: dict[str, Any] = added({}, before={})
    """timm only: arguments of the architecture for weights that differ from timm's own, such as {init_values: 1e-5}."""
    image_size: int | None = Field(default=None, ge=16, le=4096)
    """Side, in pixels, of the teacher's own input; stored views are resized to it. null: the model's own."""
    stage: int | None = Field(default=None, ge=-64, le=64)
    """timm networks with feature maps: index of the one (as in features_only) that gives the latents."""
    output: Literal["own", "raw"] = added("own", before="raw")
    """own: the latents are what the model itself uses: a class token only where its own output reads it, CLIP's
    projection, the last feature map after its final norm. raw: any class token, timm's CLIP without its projection,
    feature maps without norm, as in earlier sets."""
    summary: bool | None = added(None, before=None)
    """Whether the model's own output for the whole image (pooled, or projected by CLIP's head) is stored besides the
    patches. null: where there is no class token and the latents are the model's last, unless `output` is raw."""
    project: bool | None = added(None, before=None)
    """Whether the head of CLIP, which projects into the space shared with text, is applied to all tokens. null: yes,
    except for timm's models where `output` is raw."""
    layers: tuple[int, ...] = added((), before=())
    """ViTs: blocks, counted from 1, whose tokens are given besides the last block's, after the same final norm."""
    mean: tuple[float, float, float] | None = None
    """Channel means of the teacher's input. None: from the model's configuration."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations of the teacher's input. None: from the model's configuration."""
    grid: tuple[GridSide, GridSide] | None = added(None, before=None)
    """Rows and columns of the stored latents: the teacher's patches are averaged by area to this grid, the student's,
    so that the teacher may see views at a higher resolution. null: the teacher's own grid."""
    precision: Precision = "auto"
    """Arithmetic of the teacher. auto: on CUDA what is published for its family, bf16 for DINOv3, SigLIP and C-RADIO,
    fp16 for others; fp32 elsewhere."""

    @model_validator(mode="after")
    def _divides(self) -> TeacherSettings:
        if self.kind == "timm" and self.pretrained and "." in self.name and ":" not in self.name:
            raise ValueError(
                f"teacher.name {self.name} has its tag, and teacher.pretrained is {self.pretrained!r} as well, perhaps "
                f"from the preset: give --teacher timm:{self.name}, or --set teacher.pretrained=null"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"teacher.std must be above 0, not {self.std}")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"teacher.layers must be in ascending order, not {list(self.layers)}")
        return self


class ViewSettings(Settings):
    """How views are drawn (paper Table 8; order as in the released code: jitter, flip, crop)."""

    size: int = Field(default=224, ge=16, le=4096)
    """Side of a view in pixels, as stored and as the teacher sees it; a smaller student reads it reduced."""
    scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    jitter: float = Field(default=0.4, ge=0, lt=1)
    """Strength of brightness, contrast and saturation jitter: factors uniform in 1 -+ jitter."""
    pixels: Literal["replayed", "stored"] = added("replayed", before="stored")
    """replayed: each image is stored once, and its views are cropped from it whenever they are loaded, which needs
    fewer bytes for three or more views. stored: each view is stored, which loads faster and suits few views."""
    short_side: int | None = added(None, before=None, ge=16, le=16384)
    """Short side of the images stored for replayed views, in pixels; larger images are reduced to it, smaller ones keep
    their size. null: 320 for views of 224 pixels, so that crops are enlarged by a factor of at most 1.28."""
    quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of stored views or images."""
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0"
    """JPEG chroma subsampling of stored views or images."""

    @model_validator(mode="after")
    def _ranges(self) -> ViewSettings:
        if not 0.001 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("view.scale must satisfy 0.001 <= smallest <= largest <= 1")
        if not 0.01 <= self.ratio[0] <= self.ratio[1] <= 100:
            raise ValueError("view.ratio must satisfy 0.01 <= smallest <= largest <= 100")
        if self.short_side is not None and self.pixels == "stored":
            raise ValueError("view.short_side only applies to replayed views: set view.pixels=replayed")
        return self

    @property
    def kept_side(self) -> int:
        """Largest short side of the images stored for replayed views, in pixels."""
        # The smallest crop's short side as a share of the image's, if that is square; others have more.
        smallest = math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1]))
        return self.short_side or math.ceil(self.size / smallest / ENLARGED)


class CodecSettings(Settings):
    """How latents are compressed."""

    name: Literal["klt", "int8", "fp16"] = "klt"
    """klt: error-bounded transform codec; int8: one scale per token; fp16: the reference."""
    fidelity: float = Field(default=0.97, gt=0.5, lt=1)
    """klt only: mean cosine between decoded and true tokens, reached on held-out samples. Instead of a higher
    fidelity than the default, store more views (benchmarks/views.py)."""
    level: int = Field(default=1, ge=1, le=9)
    """klt only: zstd level. Level 1 is within 3% of level 5 in size and encodes about 3 times as fast."""
    calibration: int = Field(default=512, ge=1, le=10**6)
    """Images whose tokens give mean, basis and step; a quarter of them are held out to choose the step."""


class ExtractSpeed(Settings):
    """Settings that only change the speed."""

    workers: int = Field(default=-1, ge=-1, le=1024)
    """Processes that decode, crop and encode images; -1: one per core; 0: decode in the main process."""
    device: str = "auto"
    """Device of the teacher: auto, cpu, cuda, cuda:1, ..."""
    lanes: int | None = Field(default=None, ge=1, le=1024)
    """Blocks of 64 views that the teacher processes in parallel, one thread each; fewer need less memory. null: 4 on a
    CUDA device; one per core on a CPU."""


class ExtractSettings(Settings):
    """All settings of `cae2pipe extract-targets`."""

    teacher: TeacherSettings
    views: int = not_fingerprinted(recommend_views(300), ge=1, le=10**6)
    """Views per image: one for every 19 epochs of pretraining; the default suits 300 epochs. To add views later, run
    again with a larger number."""
    view: ViewSettings = ViewSettings()
    codec: CodecSettings = CodecSettings()
    seed: int = Field(default=0, ge=0)
    """Seed of the views' random draws."""
    shard: ShardSettings = not_fingerprinted(ShardSettings())
    speed: ExtractSpeed = ExtractSpeed()


def as_begun(codec: CodecSettings, stored: CodecIdentity) -> CodecSettings:
    """The codec's settings for an existing set: a fidelity that was not given is the set's own, since defaults change
    between versions. ``stored``: the codec's settings in the set's manifest."""
    if "fidelity" in codec.model_fields_set:
        return codec
    return codec.model_copy(update={"fidelity": stored["fidelity"]})
