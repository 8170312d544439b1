"""Fields that several settings classes share: their meaning and valid values. Each class has its own defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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
