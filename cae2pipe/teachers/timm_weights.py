"""Weights for models of timm, through timm's own filters, which rename keys and resample positions for each family."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.weights import check_fit

State = dict[str, Tensor]
Filter = Callable[[State, nn.Module], State]

_FOREIGN = ("embeddings.", "layer.0.", "encoder.layer.", "model.layer.", "vision_model.", "backbone.embeddings.")
"""How keys of models of transformers begin."""


def draft(build: Callable[[], Any]) -> tuple[Any, Filter]:
    """What ``build`` makes, on the meta device and without weights, and the filter that timm would give its weights to.

    ``build`` asks timm for one pretrained model. Raises what timm raises.
    """
    from timm.models import _builder

    caught: list[Filter | None] = []

    def catch(model: nn.Module, *_: Any, filter_fn: Filter | None = None, **__: Any) -> None:
        caught.append(filter_fn)

    # timm gives its filters only to its own loader, which would download, and which copies a state that it is given.
    with torch.device("meta"), mock.patch.object(_builder, "load_pretrained", catch):
        model = build()
    found = caught[0] if caught else None
    return model.eval(), _of_two(found) if found else (lambda state, _: state)


def _of_two(convert: Callable[..., State]) -> Filter:
    """A filter of weights and model. Some of timm's older ones take the weights alone."""
    parameters = inspect.signature(convert).parameters.values()
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return convert if len(positional) != 1 else lambda state, _: convert(state)


def fitted(
    model: Any, state: Mapping[str, Tensor], convert: Filter, *, heads: Callable[[], set[str]], where: Path
) -> State:
    """Weights in timm's, their authors' or open_clip's layout as the model takes them. Every weight of the model must
    be among them, and every weight that timm's filter keeps must belong to the model or to a head that it lacks.

    Args:
        convert: timm's filter for the model. heads: weights that the model has with its head.
        where: their file, for the message.

    Raises:
        TeacherError: they do not fit.
    """
    given = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    _refuse_transformers(given, where)
    _refuse_other_patch(model, given, where)
    _refuse_dropped_biases(model, given, where)
    own = model.state_dict()
    given = _converted(model, given, convert, where)
    if any(name in own and own[name].shape != tensor.shape for name, tensor in given.items()):
        # Some filters only rename the keys of the authors' layout, and resample only those that have timm's names.
        given = _converted(model, given, convert, where)
    if extra := given.keys() - own.keys():
        classifiers = model.pretrained_cfg.get("classifier") or ()
        names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        dropped = {name for name in extra if name.startswith(tuple(f"{part}." for part in names))}
        if dropped != extra:
            dropped |= extra & heads()
        if getattr(model, "attn_pool", ...) is None:  # timm's variants that pool otherwise load the same file
            dropped |= {name for name in extra if name.startswith("attn_pool.")}
        given = {name: tensor for name, tensor in given.items() if name not in dropped}
    # Counters of batches are not weights, and fp16 exports omit them.
    given |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in given}
    check_fit(model, given, where)
    return given


def _converted(model: Any, state: State, convert: Filter, where: Path) -> State:
    try:
        # timm's filters print, and their interpolation indexes in ways that torch warns about.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(convert(state, model))
    except (RuntimeError, ValueError, KeyError, IndexError, AssertionError, AttributeError, TypeError) as error:
        reraise_exhaustion(error)
        raise TeacherError(
            f"the weights do not fit the model: {error}",
            where=where,
            fix="check that teacher.name is the model of these weights",
        ) from None


def _refuse_transformers(state: State, where: Path) -> None:
    if any(name.startswith(_FOREIGN) for name in state) and not any(".blocks." in f".{name}" for name in state):
        raise TeacherError(
            "this file has the layout of the transformers library, which timm does not read",
            where=where,
            fix="use timm's file of these weights (hub repository timm/NAME), or the file of the model's authors",
        )


def _refuse_other_patch(model: Any, state: State, where: Path) -> None:
    """timm would resample the kernel too, and so silently accept the weights of another model."""
    kernel = model.state_dict().get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return
    for name, tensor in state.items():
        patches = name.endswith(("patch_embed.proj.weight", "visual.conv1.weight")) or name == "conv1.weight"
        if patches and tensor.ndim == 4 and tensor.shape != kernel.shape:
            raise TeacherError(
                f"the weights do not fit the model: 1 of another shape "
                f"(first: {name}, {tuple(tensor.shape)} for {tuple(kernel.shape)})",
                where=where,
                fix="check that teacher.name is the model of these weights",
            )


def _refuse_dropped_biases(model: Any, state: State, where: Path) -> None:
    """timm has DINOv3 with biases of queries and values and without, and drops them without a word in the latter."""
    if "storage_tokens" not in state or any(name.endswith("q_bias") for name in model.state_dict()):
        return
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            if bool(query.any()) or bool(value.any()):
                architecture = model.pretrained_cfg.get("architecture", "")
                raise TeacherError(
                    f"the weights have biases that {architecture} lacks (first: {name})",
                    where=where,
                    fix=f"--set teacher.name={architecture}_qkvb",
                )
