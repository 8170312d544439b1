"""Latents of a teacher against the model's own forward pass, from a file of perturbed weights.

The reference is the model with its head as the library builds it. At its own size it holds the very weights; at another
one timm's own loader reads the file. Compared are the patches after the final norm; the class token or summary, as what
the model's own classifier or projection makes of it, which must be the model's own output; and the normalisation.
Both are given the same normalised images: with random weights some models amplify the last bit of their input a
thousandfold.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.open_clip_towers import tower_shape

WHOLE = 20_000_000
"""Models with more parameters are compared with fewer layers, where they take such arguments."""

TOLERANCE = 1e-4
"""Of the largest difference, as a share of that between two images: float32 in another order of operations."""

CPU = torch.device("cpu")


def compare_timm(row: dict[str, Any]) -> dict[str, Any]:
    """The differences of a model of timm, at its own and another size."""
    name, side = row["name"], row["size"]
    args = shortened(name) if row["parameters"] > WHOLE else {}
    own = perturbed(timm.create_model(name, **args)).eval()
    found: dict[str, Any] = {"library": "timm", "name": name, "equal": True} | ({"args": args} if args else {})
    with tempfile.TemporaryDirectory() as folder:
        file = save(own.state_dict(), Path(folder))
        stage = None if row["stage"] is None else len(own.feature_info) - 1
        settings = TeacherSettings(kind="timm", name=name, stage=stage, weights=file, model_args=args)
        note(found, str(side), lambda: timm_differences(lambda: own, settings, side))
        other = another_size(own, side)
        note(found, str(other), lambda: timm_differences(lambda: resized(name, file, other, args), settings, other))
    return found


def compare_open_clip(row: dict[str, Any]) -> dict[str, Any]:
    """The differences of a tower of open_clip, at its own size: it loads files of no other."""
    name, side = row["name"], row["size"]
    settings = TeacherSettings(kind="open_clip", name=name)
    shape = tower_shape(settings)
    layers = {"layers": 2} if row["parameters"] > WHOLE and isinstance(shape["vision_cfg"].get("layers"), int) else {}
    if layers:
        shape["vision_cfg"] |= layers
        settings = settings.model_copy(update=shape)
    tower = perturbed(visual_tower(settings)).eval()
    found: dict[str, Any] = {"library": "open_clip", "name": name, "equal": True} | ({"args": layers} if layers else {})
    with tempfile.TemporaryDirectory() as folder:
        file = save({f"visual.{key}": value for key, value in tower.state_dict().items()}, Path(folder))
        settings = settings.model_copy(update={"weights": file})
        note(found, str(side), lambda: tower_differences(tower, settings))
    return found


def note(found: dict[str, Any], size: str, compare: Callable[[], dict[str, float]]) -> None:
    """Add the differences at a size, or why the teacher is refused there."""
    try:
        differences = compare()
    except TeacherError as error:
        found[size] = f"refused: {error.what.splitlines()[0][:160]}"
        return
    except Exception as error:  # a defect, of which the sweep must tell
        found[size] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        found["equal"] = False
        return
    found[size] = {what: float(f"{value:.2g}") for what, value in differences.items()}
    found["equal"] = found["equal"] and all(value <= TOLERANCE for value in differences.values())


def timm_differences(reference: Callable[[], Any], settings: TeacherSettings, side: int) -> dict[str, float]:
    """The largest differences of the patches and of the model's output."""
    teacher = load_teacher(settings.model_copy(update={"image_size": side}), CPU)
    pixels = views(side)
    given = teacher(pixels)
    own = reference()
    with torch.inference_mode():
        images = teacher.normalise(pixels.float())
        wanted = normalised(pixels, own.pretrained_cfg["mean"], own.pretrained_cfg["std"])
        x, patches = own_patches(own, images, given.tokens.shape[-1])
        differences = {
            "input": difference(images, wanted),
            "patches": difference(given.tokens[:, int(teacher.info.class_token) :], patches),
        }
        single = given.tokens[:, 0] if teacher.info.class_token else given.summary
        if teacher.info.class_token and given.summary is None and reads_more(own):
            differences["class token"] = difference(given.tokens[:, 0], x[:, 0])
        elif single is not None:
            output = own(images)
            differences["output"] = min(difference(made, output) for made in outputs_from(own, single, patches, output))
    return differences


def tower_differences(tower: Any, settings: TeacherSettings) -> dict[str, float]:
    """The same of a tower of open_clip, whose output is the embedding."""
    from cae2pipe.teachers.open_clip import normalisation

    teacher = load_teacher(settings, CPU)
    pixels = views(teacher.info.image_size)
    given = teacher(pixels)
    with torch.inference_mode():
        images = teacher.normalise(pixels.float())
        wanted = normalised(pixels, *normalisation(settings, {}))
        single = given.summary if given.summary is not None else given.tokens[:, 0]
        embedding = tower(images)
        embedding = embedding[0] if isinstance(embedding, tuple) else embedding
        differences = {"input": difference(images, wanted), "output": difference(single, embedding)}
        if hasattr(tower, "trunk") and not teacher.info.class_token:
            patches = own_patches(tower.trunk, images, given.tokens.shape[-1])[1]
            differences["patches"] = difference(given.tokens, patches)
    return differences


LAST_MAPS = {
    # feature_info names modules that timm does not have, or that give something else.
    "HighResolutionNet": "incre_modules.3",
    "PoolingVisionTransformer": "transformers.2",
    "Xcit": "blocks.-1",
}
"""The module whose output is the last feature map, as the library's ``features_only`` counts them, of models whose
forward_features ends in something else: HRNet in the sum of all its maps; PiT in the class token alone; XCiT in layers
that make the class token of the patches, and leave of these what nothing reads."""


def own_patches(model: Any, images: Tensor, width: int) -> tuple[Any, Tensor]:
    """What a model's forward_features gives, and its patches (B, P, width) after the final norm, position by position.

    Where layers after the last feature map change its width, the map is caught at the module that gives it.
    """
    kind = type(model).__name__
    caught: list[Any] = []
    with last_module(model).register_forward_hook(lambda _, __, output: caught.append(output)):
        x = model.forward_features(images)
    if kind in LAST_MAPS:
        features = caught[-1][0] if isinstance(caught[-1], tuple) else caught[-1]
        return x, model.norm(features) if kind == "Xcit" else features.flatten(2).transpose(1, 2)
    final = x[-1] if isinstance(x, list) else x
    if final.ndim == 4 and width not in (final.shape[1], final.shape[-1]) and caught:
        features = caught[-1]
        return x, features.flatten(2).transpose(1, 2) if features.shape[1] == width else features.flatten(1, 2)
    if final.ndim == 4:
        patches = final.permute(0, 2, 3, 1) if final.shape[1] == width else final
        patches = patches.flatten(1, 2)
    elif kind.startswith("EfficientViM"):
        patches = final.transpose(1, 2)
    else:
        # VOLO, CoaT and CrossViT do not say that they have a class token.
        single = isinstance(x, list) or kind == "VOLO"
        patches = final[:, getattr(model, "num_prefix_tokens", int(single)) :]
    after = getattr(model, "fc_norm", None) if isinstance(getattr(model, "norm", None), nn.Identity) else None
    for norm in (after, getattr(getattr(model, "head", None), "norm", None)):
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (patches.shape[-1],):
            # Some are timm's for channels first.
            patches = F.layer_norm(patches, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if patches.shape[-1] != width and isinstance(getattr(model, "head", None), nn.Linear):
        patches = model.head(patches)  # CLIP's projection
    return x, patches


def last_module(model: Any) -> nn.Module:
    """The module that gives the last feature map; the model itself, which no one calls here, if nothing names it."""
    if name := LAST_MAPS.get(type(model).__name__):
        *parents, last = name.split(".")
        return model.get_submodule(".".join(parents))[int(last)]
    name = (getattr(model, "feature_info", None) or [{}])[-1].get("module", "")
    for spelled in (name, name.replace("_", ".")):  # some have an underscore for a dot
        with contextlib.suppress(AttributeError):
            return model.get_submodule(spelled)
    return model


def outputs_from(model: Any, single: Tensor, patches: Tensor, output: Tensor) -> list[Tensor]:
    """What the model may make of a class token or summary: itself, if that is its output, or what its classifier does,
    or the mean of two classifiers'. The classifiers of some models read several summaries in a row."""
    kind = type(model).__name__
    if kind == "VOLO":
        return [model.head(single) + 0.5 * model.aux_head(patches).max(1)[0]]
    if kind == "CrossVit":
        parts = single.split([head.in_features for head in model.head], dim=1)
        return [sum(head(part) for head, part in zip(model.head, parts, strict=True)) / len(parts)]
    if kind.startswith("EfficientViM"):
        parts = single.split([head.in_features for head in model.heads], dim=1)
        scored = [(model.heads, model.weights)]
        scored += [(model.heads_dist, model.weights_dist)] if kind.endswith("Distilled") else []
        made = [
            sum(head(part) * weight for head, part, weight in zip(heads, parts, weights.softmax(-1), strict=True))
            for heads, weights in scored
        ]
        return [sum(made) / len(made)]
    found = [single] if single.shape == output.shape else []
    heads = model.get_classifier()
    # Some norm the summary as part of the head, of which the classifier is the last layer.
    heads = list(heads) if isinstance(heads, tuple) else [heads, getattr(model, "head", None)]
    if isinstance(model.get_classifier(), tuple):
        heads = [lambda given, heads=heads: (heads[0](given) + heads[1](given)) / 2]
    for head in heads:
        inner = getattr(head, "fc", head)
        for apply in (head, inner, lambda given, inner=inner: inner(given[:, :, None, None]).flatten(1)):
            with contextlib.suppress(RuntimeError, TypeError, IndexError, ValueError):
                found.append(apply(single))
    return found


def reads_more(model: Any) -> bool:
    """Whether the output is not of the class token alone: a distilled model adds its second token, and timm's edition
    of DINOv3 pools the patches' mean."""
    pools = model.global_pool == "avg" and not isinstance(model.norm, nn.Identity)
    return pools or isinstance(model.get_classifier(), tuple)


def perturbed(model: Any, seed: int = 0) -> Any:
    """The model with weights of which none is a zero or one by default, and positions that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if "pos" in name or "bias_table" in name else 0.05 if weight.ndim < 2 else 0.01
            weight += scale * torch.randn(weight.shape, generator=generator)
        for name, values in model.named_buffers():
            if name.endswith("running_mean"):
                values += 0.1 * torch.randn(values.shape, generator=generator)
            if name.endswith("running_var"):
                values *= torch.exp(0.2 * torch.randn(values.shape, generator=generator))
    return model


def shortened(name: str) -> dict[str, Any]:
    """Arguments that make a large model less deep, if it takes such."""
    for args in ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)}):
        try:
            with torch.device("meta"):
                timm.create_model(name, **args)
        except Exception:  # models refuse unknown arguments, and depths that do not suit them, in many ways
            continue
        return args
    return {}


def resized(name: str, file: Path, side: int, args: dict[str, Any]) -> Any:
    """The model at another size, with the weights as timm itself loads them."""
    options = {**args, "pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "custom_load": False}}
    try:
        return timm.create_model(name, img_size=side, **options).eval()
    except TypeError:
        return timm.create_model(name, **options).eval()


def another_size(model: Any, side: int) -> int:
    """A size other than its own that any grid allows: a little smaller, if that is enough."""
    patch = getattr(model, "patch_embed", None)
    # DeepSeek's encoder merges three by three patches of 14.
    step = patch.feat_ratio() if hasattr(patch, "feat_ratio") else 32 if side % 32 == 0 or side % 42 else 42
    step = step if isinstance(step, int) else max(step)
    step *= max(1, 32 // step)
    return side - step if side >= 8 * step else side + step


def visual_tower(settings: TeacherSettings) -> Any:
    """The visual tower of a model of open_clip, with random weights."""
    from open_clip.model import _build_vision_tower

    shape = tower_shape(settings)
    return _build_vision_tower(shape["embed_dim"], shape["vision_cfg"], quick_gelu=shape["quick_gelu"])


def save(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(
        {name: value.detach().clone().contiguous() for name, value in state.items()}, folder / "weights.safetensors"
    )
    return folder / "weights.safetensors"


def views(side: int) -> Tensor:
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    return (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def difference(given: Tensor, own: Tensor) -> float:
    """The largest difference as a share of the root mean square of what differs between the reference's two images:
    what is the same for all images proves nothing. Where that is below a twentieth of the reference's own root mean
    square, of this twentieth: float32 has no more digits. Infinite for other shapes and values that are not finite."""
    if given.shape != own.shape or not bool(own.isfinite().all()) or torch.equal(own[0], own[1]):
        return float("inf")
    scale = max(float((own[0] - own[1]).square().mean().sqrt()), float(own.square().mean().sqrt()) / 20)
    return float((given - own).abs().max()) / scale
