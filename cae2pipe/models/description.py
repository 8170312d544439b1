"""Allowed content of an exported encoder's ``config.json``: checked before a model is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from cae2pipe.artifacts.json_files import read_json
from cae2pipe.errors import SourceError

FIX = "use a folder written by `cae2pipe pretrain` or `cae2pipe export`"

Mean = Annotated[float, Field(ge=-10, le=10)]
Deviation = Annotated[float, Field(gt=0, le=10)]


class TimmConfig(TypedDict):
    """A ``config.json`` in timm's format. Other fields of timm are allowed."""

    architecture: str
    num_classes: NotRequired[int]
    num_features: NotRequired[int]
    global_pool: NotRequired[str]
    model_args: NotRequired[dict[str, Any]]
    pretrained_cfg: dict[str, JsonValue]


class ModelArguments(BaseModel):
    """Arguments of timm's vision transformer. Its other arguments are allowed if their numbers are of moderate size."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    img_size: int = Field(default=224, ge=1, le=8192)
    patch_size: int = Field(default=16, ge=1, le=1024)
    embed_dim: int = Field(default=768, ge=1, le=16384)
    depth: int = Field(default=12, ge=1, le=256)
    num_heads: int = Field(default=12, ge=1, le=1024)

    @model_validator(mode="after")
    def _moderate(self) -> ModelArguments:
        for name, value in (self.model_extra or {}).items():
            plain = (
                value is None
                or isinstance(value, bool | str)
                or (isinstance(value, int | float) and abs(value) <= 1024)
            )
            if not plain:
                raise ValueError(f"{name} is neither text nor a number of at most 1024")
        return self


class Preparation(BaseModel):
    """How images are prepared: channel means and standard deviations of pixels in [0, 1]."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    mean: tuple[Mean, Mean, Mean] = Field(strict=False)
    std: tuple[Deviation, Deviation, Deviation] = Field(strict=False)
    input_size: tuple[int, int, int] = Field(strict=False)


class Description(BaseModel):
    """A ``config.json`` in timm's format."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    architecture: str
    pretrained_cfg: Preparation
    model_args: ModelArguments = ModelArguments()


def read_description(path: Path, weights: int) -> TimmConfig:
    """The values of a ``config.json``.

    Args:
        path: the file. weights: bytes of the weights file that it describes.

    Raises:
        SourceError: the content is invalid (the message names the field), or the model would have more weights than the
        file can hold.
    """
    config: TimmConfig = read_json(path, fix=FIX, error=SourceError, limit=2**20)
    try:
        shape = Description.model_validate(config).model_args
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise SourceError(
            f"this does not describe a timm model: {field}: {first['msg']}", where=path, fix=FIX
        ) from None
    if "model_args" in config:
        # A block has at least four square layers, and a weight takes at least one byte.
        least = shape.embed_dim * (4 * shape.depth * shape.embed_dim + (shape.img_size // shape.patch_size) ** 2)
        if least > weights:
            raise SourceError(
                f"this describes a model of over {least} weights, but the weights file has {weights} bytes",
                where=path,
                fix=FIX,
            )
    return config
