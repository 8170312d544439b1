"""MILAN: the teacher's attention says what is seen, and a decoder's mask tokens are prompted by it."""

from __future__ import annotations

from cae2pipe.methods.mae import MAE
from cae2pipe.models.decoder import PromptingDecoder


class MILAN(MAE):
    """MAE with a decoder that updates mask tokens alone: no mask token has a part in what is predicted of visible ones.

    Source: Hou et al., 2022. As published it goes with ``mask: {strategy: attention, ratio: 0.75}`` and
    ``loss: {reduction: one_mean}``: a mean over all tokens of the distance of unit latents, which is the cosine's up to
    a factor. Simplified: LayerScale and fixed positions as in all encoders here; the class token is in the mean where
    the teacher has one.
    """

    decoder_class = PromptingDecoder
