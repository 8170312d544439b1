"""The targets of one teacher, from its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.pretrain import LossSettings
from cae2pipe.targets.codecs import Codec
from cae2pipe.targets.groups import SUMMARY
from cae2pipe.targets.store_layout import arrays_of
from cae2pipe.training.standardisation import Standardisation


class Alignment(nn.Module):
    """The targets of one teacher.

    Args:
        loss: distance, reduction and weights.
        codec: the codec of the stored latents.
        mean: the targets' mean unit token (D,).
        class_token: whether there is a target for the class token.
        summary: the codec of stored summaries, if they are targets.
        pooled: width of the summaries, then.
        weight: of this teacher's loss.
        standard: of tokens and of summaries, if several teachers' lengths count. Latents of original length are
            standardised, final targets are not.
    """

    def __init__(
        self,
        loss: LossSettings,
        codec: Codec,
        *,
        mean: Tensor,
        class_token: bool,
        summary: Codec | None = None,
        pooled: int | None = None,
        weight: float = 1.0,
        standard: Sequence[Standardisation | None] = (None, None),
    ) -> None:
        super().__init__()
        self.loss = loss
        self.codec = codec
        self.class_token = class_token
        self.summary, self.pooled, self.weight = summary, pooled, weight
        self.mean: Tensor
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        for name, given in zip(("tokens", "summaries"), standard, strict=True):
            self.register_buffer(f"{name}_mean", None if given is None else given.mean, persistent=False)
            self.register_buffer(f"{name}_matrix", None if given is None else given.matrix, persistent=False)

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    def target(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Targets (B, T, D) float32: of unit length, or of original length if ``norms`` are given, then standardised if
        ``standard`` is given."""
        if "decoded" in latents:
            return latents["decoded"]
        own = self._of_teacher(latents["raw"]) if "raw" in latents else decoded(self.codec, latents)
        return self._standard(own, "tokens")

    def summary_target(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        """Summaries (B, 1, W) float32 as ``target`` gives latents; None if they are no targets."""
        if self.summary is None:
            return None
        if "decoded_summary" in latents:
            return latents["decoded_summary"]
        if "raw_summary" in latents:
            own = self._of_teacher(latents["raw_summary"])
        else:
            own = decoded(self.summary, arrays_of(SUMMARY, latents))
        return self._standard(own, "summaries")

    def _of_teacher(self, raw: Tensor) -> Tensor:
        return F.normalize(raw, dim=-1) if self.loss.kind == "cosine" else raw

    def _standard(self, tokens: Tensor, name: str) -> Tensor:
        mean, matrix = getattr(self, f"{name}_mean"), getattr(self, f"{name}_matrix")
        return tokens if mean is None else (tokens - mean) @ matrix

    def decoded_targets(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The final targets, in the form in which ``target`` takes them as latents."""
        summary = self.summary_target(latents)
        return {"decoded": self.target(latents), **({} if summary is None else {"decoded_summary": summary})}

    def place(self, device: torch.device) -> None:
        """Copy the constants of the codecs to a device."""
        self.codec.place(device)
        if self.summary is not None:
            self.summary.place(device)


def decoded(codec: Codec, arrays: Mapping[str, Tensor]) -> Tensor:
    """A group's tokens (B, T, D) float32: of unit length, or of original length if there are ``norms``."""
    target = codec.decode(arrays)
    return target * arrays["norms"].float().unsqueeze(-1) if "norms" in arrays else target
