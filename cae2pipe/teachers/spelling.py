"""One spelling of a teacher, for every command: a model of a library or of a hub, or a preset, with its weights.

timm:NAME.TAG          a model of timm; NAME alone has timm's default weights
open_clip:NAME/TAG     a vision tower of open_clip
hf-hub:ORG/NAME        a model that a hub repository describes in its config.json, as timm writes it
local-dir:PATH         the same in a folder
PRESET, FILE.yaml      a preset of extract-targets, or a file of its settings

All but local-dir: take ``@FILE``, a local file of the weights. A model has its own input size unless a setting gives
another.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cae2pipe.config.base import build, preset_names, read_preset
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import SettingsError, TeacherError
from cae2pipe.teachers.hub import FOLDER, HUB, local_dir
from cae2pipe.teachers.weights import safetensors_metadata

LIBRARIES = ("timm", "open_clip", "hf-hub", "local-dir")
FORMS = "timm:NAME.TAG, open_clip:NAME/TAG, hf-hub:ORG/NAME, local-dir:PATH, or a preset; @FILE for local weights"


def teacher_settings(text: str) -> TeacherSettings:
    """The settings that a spelling stands for. Raises as ``teacher_values``."""
    return build(TeacherSettings, teacher_values(text), where=f"teacher {text}")


def teacher_values(text: str) -> dict[str, Any]:
    """The values of ``TeacherSettings`` that a spelling stands for: those of the section ``teacher``, all of them.

    Raises:
        SettingsError: not one of the forms; there is no such preset. TeacherError: the library has no such model or
            no such weights; names the nearest.
    """
    file_url = re.search(r"(?:^|@)(?!(?i:file):)[A-Za-z][A-Za-z0-9+.-]*://", text)
    if file_url:
        raise SettingsError(
            "a teacher is a local file or a name, not a URL",  # which may hold a password, so that it is not shown
            where=f"teacher {text[: file_url.start()]}".strip(),
            fix=f"copy what is there to a local path; give {FORMS}",
        )
    library, colon, rest = text.partition(":")
    if library == "teacher" and rest:
        raise SettingsError("the form teacher: is for encoders", where=f"teacher {rest}", fix=f"give {rest}")
    if library == "local-dir" and "@" in rest and not Path(rest).expanduser().is_dir():
        folder, _, file = rest.rpartition("@")
        if not folder or Path(folder).expanduser().is_dir():
            raise SettingsError(
                f"local-dir: takes a folder with its weights, and no @FILE ({file})",
                where=text,
                fix=f"give {local_dir(folder or 'PATH')}, with --set teacher.weights=FILE",
            )
    if not colon or library not in LIBRARIES:
        return _preset(text)
    name, _, file = (rest, "", "") if library == "local-dir" else rest.partition("@")
    if not name:
        raise SettingsError(f"{library}: must be followed by a name", where=text, fix=f"give {FORMS}")
    values = {
        "timm": lambda: _timm(name, local=bool(file)),
        "open_clip": lambda: _open_clip(name, file),
        "hf-hub": lambda: _described(HUB, name),
        "local-dir": lambda: _described(FOLDER, name),
    }[library]()
    return {**values, "weights": file} if file else values


def _preset(text: str) -> dict[str, Any]:
    name, _, file = text.partition("@")
    if name not in preset_names("extract") and not name.endswith((".yaml", ".yml")):
        nearest = _nearest_spelling(name)
        raise SettingsError(
            f"unknown teacher {name!r}" + (f" (nearest: {nearest!r})" if nearest else ""),
            where=f"teacher {text}",
            fix=f"give {FORMS}; `cae2pipe teachers list` shows the presets",
        )
    values = read_preset("extract", name).get("teacher")
    if not isinstance(values, dict):
        raise SettingsError("it has no section `teacher`", where=name, fix="add the section, or give another file")
    return {**values, "weights": file} if file else values


def _timm(name: str, *, local: bool) -> dict[str, Any]:
    import timm

    architecture, dot, tag = name.partition(".")
    if architecture not in timm.list_models():
        raise _no_model("timm", architecture, timm.list_models(), lambda found: f"timm:{found}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if (dot and tag not in tags) or not (dot or local or tags):
        raise _no_weights("timm", architecture, tag, tags, separator=".")
    return {"kind": "timm", "name": name}


def _open_clip(name: str, file: str) -> dict[str, Any]:
    from open_clip import list_models, list_pretrained_tags_by_model

    model, _, tag = name.partition("/")
    if model not in list_models():
        if file and "vision_cfg" in safetensors_metadata(Path(file)):  # the file describes its own tower
            return {"kind": "open_clip", "name": model}
        raise _no_model("open_clip", model, list_models(), _tagged(tag))
    tags = list_pretrained_tags_by_model(model)
    if tag not in tags and (tag or not file):
        raise _no_weights("open_clip", model, tag, tags, separator="/")
    return {"kind": "open_clip", "name": model, **({"pretrained": tag} if tag else {})}


def _tagged(tag: str) -> Callable[[str], str]:
    """The spelling of a model of open_clip, with the tag if it has that."""
    from open_clip import list_pretrained_tags_by_model

    return lambda model: f"open_clip:{model}" + (f"/{tag}" if tag in list_pretrained_tags_by_model(model) else "")


def _nearest_model(name: str, known: Sequence[str]) -> list[str]:
    """The model that differs in case only, else the nearest."""
    folded = {each.casefold(): each for each in known}
    return [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, n=1)]


def _described(form: str, name: str) -> dict[str, Any]:
    """A model whose own ``config.json`` describes it; timm builds it, whichever class it has."""
    if form == HUB and not all(name.partition("/")):
        raise SettingsError(
            f"{HUB}{name} does not name a repository", where=f"teacher {HUB}{name}", fix=f"give {HUB}ORG/NAME"
        )
    return {"kind": "timm", "name": f"{form}{name}"}


def _no_model(library: str, name: str, known: Sequence[str], spelling: Any) -> TeacherError:
    nearest = _nearest_model(name, known)
    return TeacherError(
        f"{library} has no model {name!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
        where=f"teacher {library}:{name}",
        fix=f"give {spelling(nearest[0])}" if nearest else f"give one of {library}.list_models()",
    )


def _no_weights(library: str, name: str, tag: str, tags: Sequence[str], *, separator: str) -> TeacherError:
    whole = f"{library}:{name}"
    begun = [known for known in tags if tag and known.startswith(tag)]
    nearest = begun or difflib.get_close_matches(tag, tags, n=1, cutoff=0.4)
    ordered = [*nearest, *(known for known in tags if known not in nearest)]
    return TeacherError(
        f"{library} has no weights {tag!r} of {name}" if tag else f"no weights of {name} are named",
        where=f"teacher {whole}",
        fix=f"give {', or '.join(f'{whole}{separator}{known}' for known in ordered[:4])}"
        + (f" ({len(ordered)} in total)" if len(ordered) > 4 else "")
        if tags
        else f"give {whole}@FILE; {library} knows no weights of it",
    )


def _nearest_spelling(name: str) -> str | None:
    """The nearest preset, or the library's model that is missing its prefix."""
    model = name.partition(".")[0]
    if close := difflib.get_close_matches(name, preset_names("extract"), n=1, cutoff=0.6):
        return close[0]
    if "_" in model or "." in name:
        import timm

        if model in timm.list_models():
            return f"timm:{name}"
    elif "/" in name or "-" in name:
        from open_clip import list_models

        if name.partition("/")[0] in list_models():
            return f"open_clip:{name}"
    return None
