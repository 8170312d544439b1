"""Settings of evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cae2pipe.config.base import Settings

Feature = Literal["auto", "class", "mean"]


class EvaluateSpeed(Settings):
    """What changes only the speed."""

    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:1, ..."""
    workers: int = Field(default=-1, ge=-1)
    """Processes that decode images; -1: one a core; 0: none, in the main process."""
    batch: int = Field(default=64, ge=1)
    """Images that pass the encoder together."""


class FeatureSettings(Settings):
    """How images become features."""

    feature: Feature = "auto"
    """class: the class token; mean: the mean of the patches; auto: the class token where training reached it."""
    image_size: int | None = Field(default=None, ge=16)
    """Side of the crop in pixels. null: the encoder's own."""
    crop: float = Field(default=0.875, gt=0, le=1)
    """Side of the central crop over the resized image's shorter side: 224 of 256."""


class KnnSettings(Settings):
    """Weighted k nearest neighbours on frozen features, as in DINO's protocol."""

    features: FeatureSettings = FeatureSettings()
    k: tuple[int, ...] = (20, 10, 100, 200)
    """Numbers of neighbours, or one. The first one's accuracy is the headline."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour with cosine c weighs exp(c / temperature)."""
    seed: int = Field(default=0, ge=0)
    """Seed of `random:` encoders."""
    speed: EvaluateSpeed = EvaluateSpeed()

    @field_validator("k", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _counts(self) -> KnnSettings:
        if not self.k or min(self.k) < 1:
            raise ValueError("k must hold at least one number, each at least 1")
        return self


FAST_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates that a fast linear evaluation tries, about the paper's 0.1."""


class LinearSettings(Settings):
    """A linear classifier on frozen features of central crops (head and optimiser: paper, Table 9)."""

    features: FeatureSettings = FeatureSettings()
    epochs: int = Field(default=90, ge=1)
    """Passes over the training features."""
    warmup_epochs: int = Field(default=10, ge=0)
    """Epochs of linear warm-up."""
    batch: int = Field(default=16384, ge=2)
    """Features a step. Sets below 16 batches take smaller ones, down to 64, so that an epoch has up to 16 steps."""
    lr: float = Field(default=0.1, gt=0, le=1e4)
    """Peak learning rate of LARS at a batch of 256; it scales linearly with `batch`, as set here."""
    sweep: tuple[float, ...] = ()
    """Learning rates to train with at once, as `lr` counts them: the one that is best on held-out training images takes
    lr's place. Empty: lr it is."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of each training class that a sweep holds out."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """LARS's momentum."""
    seed: int = Field(default=0, ge=0)
    """Seed of the head, of the order and of `random:` encoders."""
    speed: EvaluateSpeed = EvaluateSpeed()

    @model_validator(mode="after")
    def _lengths(self) -> LinearSettings:
        if any(not 0 < lr <= 1e4 for lr in self.sweep):
            raise ValueError("sweep holds learning rates above 0, and at most 1e4")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} leaves nothing of {self.epochs} epochs: lower it")
        return self


EVALUATIONS: dict[str, type[KnnSettings] | type[LinearSettings]] = {"knn": KnnSettings, "linear": LinearSettings}
"""Evaluations by name, which is also that of their preset."""
