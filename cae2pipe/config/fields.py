"""Fields that several settings classes share: their meaning and valid values. Each class has its own defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cae2pipe.artifacts.storage import is_remote, to_local_path, to_path


def _local(value: Any) -> Any:
    """A local path, also of its URL. Raises BadInputError for the URL of a remote one."""
    return to_local_path(value) if isinstance(value, str | os.PathLike) or is_remote(value) else value


def _text(value: Any) -> Any:
    """A path or URL as text."""
    return str(to_path(value)) if isinstance(value, os.PathLike) or is_remote(value) else value


LocalPath = Annotated[Path, BeforeValidator(_local)]
PathOrUrl = Annotated[str, BeforeValidator(_text)]

Recipe = Annotated[
    Literal["paper", "official"],
    Field(
        description="paper: as in the paper; official: as in its authors' released code. Presets set the fields that "
        "differ."
    ),
]
Flip = Annotated[float, Field(ge=0, le=1, description="Probability of a horizontal flip.")]
Epochs = Annotated[int, Field(ge=1, le=10**6, description="Passes over the training images.")]
WarmupSteps = Annotated[int, Field(ge=0, le=10**9, description="Steps of linear warm-up.")]
Beta1 = Annotated[float, Field(ge=0, lt=1, description="AdamW's first momentum.")]
Beta2 = Annotated[float, Field(ge=0, lt=1, description="AdamW's second momentum.")]
WeightDecay = Annotated[float, Field(ge=0, le=1e4, description="Decay of weights with two or more dimensions.")]
DropPath = Annotated[float, Field(ge=0, lt=1, description="Largest drop path rate of the encoder.")]
InitialLayerScale = Annotated[float | None, Field(gt=0, le=1e3, description="As in fine-tuning.")]
ValidateEpochs = Annotated[
    int,
    Field(ge=0, le=10**6, description="Epochs between evaluations on the val images; 0: at the end only."),
]
