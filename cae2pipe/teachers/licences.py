"""The licence of a teacher's weights, as its hub repository declares it. What nobody declares is unknown."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.json_files import read_json
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.hub import cached_file, folder_of, repository_of, timm_name
from cae2pipe.teachers.lite0 import LITE0, lite0_file


def teacher_licence(settings: TeacherSettings) -> str | None:
    """``teacher.licence``, else what timm's or the hub's configuration of the named weights says; None: unknown.

    No network. A file of weights is that of its name and tag; without a tag nothing is known about it.
    """
    if settings.licence:
        return settings.licence
    if settings.name == LITE0 and lite0_file():
        return None  # the package declares none
    if (described := _description(settings)) is not None:
        return _declared(described)
    if settings.weights is not None and not (settings.pretrained or "." in settings.name):
        return None
    return _timm_licence(timm_name(settings)) if settings.kind == "timm" else _open_clip_licence(settings)


def _timm_licence(name: str) -> str | None:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    return (config.license or None) if config else None


def _open_clip_licence(settings: TeacherSettings) -> str | None:
    """open_clip does not know licences, but many of its weights are in repositories of timm's models."""
    from open_clip import get_pretrained_cfg

    config = get_pretrained_cfg(settings.name, settings.pretrained) if settings.pretrained else {}
    owner, _, model = str(config.get("hf_hub", "")).strip("/").partition("/")
    return _timm_licence(model) if owner == "timm" else None


def _description(settings: TeacherSettings) -> Path | None:
    """The ``config.json`` of a model that a hub repository or a folder describes, if it is on this machine."""
    if folder := folder_of(settings):
        return folder / "config.json"
    repository = repository_of(settings)
    return cached_file(repository, ["config.json"]) if repository else None


def _declared(path: Path) -> str | None:
    if not path.is_file():
        return None
    content = read_json(path, fix="give --set teacher.licence=...", error=TeacherError)
    config = content.get("pretrained_cfg") if isinstance(content, dict) else None
    licence = config.get("license") if isinstance(config, dict) else None
    return licence if isinstance(licence, str) and licence.isprintable() and 1 <= len(licence) <= 200 else None
