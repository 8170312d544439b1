"""Any encoder as a network that can be trained on labels."""

from __future__ import annotations

from cae2pipe.evaluation.encoders import FrozenEncoder, FrozenTeacher, Student
from cae2pipe.models.trainable import (
    add_relative_positions,
    add_rotary_positions,
    check_trainable,
    freeze_fixed_positions,
    plain_vit,
    resize_input,
    set_drop_path,
    unfold_layer_scale,
)
from cae2pipe.supervised.normalised import Normalised


def prepared_encoder(
    encoder: FrozenEncoder,
    spec: str,
    *,
    image_size: int | None,
    layer_scale: float | None,
    drop_path: float,
    relative_positions: bool,
) -> Normalised:
    """The encoder with all weights trainable except fixed positions. ``encoder`` is changed in place and must not be
    used any more.

    Args:
        spec: the encoder as the user named it. image_size: side of the input; None: the encoder's own. layer_scale:
        initial value for one of our encoders without LayerScale. drop_path: largest rate. relative_positions: whether
        each block gets a bias by relative position; an encoder that was trained with one keeps it anyway, and so
        does one with rotary positions.

    Raises:
        SettingsError: it is not a plain vision transformer of timm, or the settings do not fit it.
    """
    if isinstance(encoder, Student):
        model, normalise = encoder.model, encoder.normalise
    else:
        assert isinstance(encoder, FrozenTeacher)
        model, normalise = getattr(encoder.teacher, "model", encoder.teacher), encoder.teacher.normalise
    model, tables, reach = plain_vit(model)
    check_trainable(model, spec)
    model.requires_grad_(True)
    freeze_fixed_positions(model)
    if image_size:
        resize_input(model, image_size)
    if layer_scale and isinstance(encoder, Student) and encoder.ours:
        unfold_layer_scale(model, layer_scale)
    set_drop_path(model, drop_path)
    if reach:
        add_rotary_positions(model, reach)
    if relative_positions or tables:
        add_relative_positions(model, spec, tables)
    return Normalised(model, normalise)
