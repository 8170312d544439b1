"""MILAN: the teacher's attention guides the mask, and visible latents prompt the decoder's mask tokens."""

from __future__ import annotations

from cae2pipe.methods.mae import MAE
from cae2pipe.models.decoder import PromptingDecoder


class MILAN(MAE):
    """MAE with a decoder that updates only mask tokens, so predictions of visible tokens do not depend on mask tokens.

    Source: Hou et al., 2022. The published settings are ``mask: {strategy: attention, ratio: 0.75}`` and ``loss:
    {reduction: one_mean}``: a mean over all tokens of the distance of unit latents, which equals the cosine's up to a
    factor. Simplified: LayerScale and fixed positions as in all encoders here; the mean includes the class token if the
    teacher has one.
    """

    decoder_class = PromptingDecoder
