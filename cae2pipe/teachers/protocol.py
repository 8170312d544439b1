"""The interface of a teacher: uint8 views in, latents of every token out."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.errors import TeacherError
from cae2pipe.images.normalise import Normalise


@dataclass(frozen=True)
class TeacherInfo:
    """What a teacher's latents depend on, and their shape.

    ``architecture`` holds what the name alone does not specify (JSON values), ``weights`` is a digest of the loaded
    weights, ``precision`` fp32, bf16 or fp16, ``rows`` x ``cols`` the grid of patches, ``dim`` D. ``mean`` and ``std``
    are for pixels in [0, 1]. ``summary``: width of the model's own output for the whole image, None if that is the
    class token or is not wanted. ``layers``: blocks whose tokens are given besides those of the last.
    """

    library: str
    name: str
    architecture: dict[str, Any]
    weights: str
    dim: int
    rows: int
    cols: int
    class_token: bool
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    summary: int | None = None
    layers: tuple[int, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Plain values for the target set's fingerprint."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std), "layers": list(self.layers)}
        # Sets of before these were known have the fingerprint of those that lack them.
        return {name: value for name, value in values.items() if value or name not in ("summary", "layers")}


@dataclass(frozen=True)
class TeacherOutput:
    """tokens (B, T, D) float32, the class token first if there is one; attention (B, P) float32 of the last block from
    the class token to the patches, mean over heads, or None. summary (B, W) float32, or None; layers: (B, T, D) float32
    by number of the block."""

    tokens: Tensor
    attention: Tensor | None
    summary: Tensor | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)


class Outputs(NamedTuple):
    """Which latents a model gives: their dimension, the grid, whether a class token comes first, the summary's width or
    None."""

    dim: int
    rows: int
    cols: int
    class_token: bool
    summary: int | None


CPU_BATCH = 8
"""Batch of a teacher on a CPU, where it matters most that activations fit into the cache. On two cores a batch of 8
instead of 64 makes EfficientNet-Lite0 2.9 times as fast, and ViT-Ti/16 1.3 times (benchmarks/teacher_batch.py)."""


class Teacher(ABC):
    """A frozen model. Subclasses define how it gives tokens.

    ``attends``: whether it gives attention. ``native``: side of the input in pixels that it was trained for.
    ``assumed``: what of its input or arithmetic nothing says about its weights, for the log.
    """

    attends = False
    native: int | None = None
    assumed: str = ""

    def __init__(self, info: TeacherInfo, device: torch.device):
        self.info = info
        self.device = device
        self.normalise = Normalise(info.mean, info.std, device)
        # Several threads may run the model at once.
        self._seen = threading.local()

    @property
    def _attention(self) -> Tensor | None:
        """The attention recorded by a hook in this thread's forward pass."""
        return getattr(self._seen, "attention", None)

    @_attention.setter
    def _attention(self, attention: Tensor | None) -> None:
        self._seen.attention = attention

    @property
    def unwrapped(self) -> Teacher:
        """The teacher whose latents this one changes, if it is a wrapper of another one."""
        return self

    @abstractmethod
    def tokens(self, pixels: Tensor) -> TeacherOutput:
        """Latents of normalised pixels (B, 3, S, S)."""

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> TeacherOutput:
        """Latents of views, uint8 (B, 3, H, W) on the teacher's device, resized to its input size if that differs.

        Below fp32, autocast computes as in the released code: matrix products in fp16, LayerNorm and softmax in fp32.
        """
        parts = []
        # The split is fixed: the number of images in a batch can change the last bit.
        for part in pixels.split(CPU_BATCH) if self.device.type == "cpu" else [pixels]:
            images = resize_pixels(part.float(), self.info.image_size)
            with torch.autocast(self.device.type, DTYPES[self.info.precision], enabled=self.info.precision != "fp32"):
                parts.append(self.tokens(self.normalise(images)))
        attention = [part.attention for part in parts if part.attention is not None]
        summary = [part.summary.float() for part in parts if part.summary is not None]
        return TeacherOutput(
            torch.cat([part.tokens.float() for part in parts]),
            torch.cat(attention) if attention else None,
            torch.cat(summary) if summary else None,
            {block: torch.cat([part.layers[block].float() for part in parts]) for block in self.info.layers},
        )


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resize_pixels(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 255] to (B, 3, size, size), bicubic with antialiasing, rounded as uint8 would be.

    Between this resize by torch and Pillow's, the teacher's latents have a mean cosine of 0.9997.
    """
    if pixels.shape[-2:] == (size, size):
        return pixels
    resized = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).round()


def check_grid(image_size: int, patch: int) -> None:
    """Refuse an input that is not a whole number of patches: the rest would be dropped silently.

    Raises:
        TeacherError: ``image_size`` is not a multiple of ``patch``.
    """
    if image_size % patch:
        raise TeacherError(
            f"teacher.image_size {image_size} is not a multiple of the teacher's patch, {patch}",
            where="teacher.image_size",
            fix=f"--set teacher.image_size={max(1, round(image_size / patch)) * patch}",
        )


def channels(values: Any, where: object, *, positive: bool = False) -> tuple[float, float, float]:
    """Three finite numbers from a configuration, for the mean or the standard deviation; ``positive`` ones for the
    latter. Raises TeacherError."""
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(type(value) in (int, float) and abs(value) < 1e30 for value in values)
    ):
        raise TeacherError(f"mean and std must be three numbers, not {values!r}", where=where, fix="correct the file")
    if positive and min(values) <= 0:
        raise TeacherError(f"std must be above 0, not {values!r}", where=where, fix="correct the file")
    first, second, third = (float(value) for value in values)
    return first, second, third


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention of q (B, H, 1, d) to all of k (B, H, T, d) except the first, mean over heads: (B, T - 1), float32."""
    # Autocast would compute this product in fp16.
    with torch.autocast(q.device.type, enabled=False):
        scores: Tensor = (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return scores[:, :, 0, 1:].mean(dim=1)
