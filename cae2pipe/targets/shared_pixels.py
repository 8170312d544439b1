"""Where the pixels of a set by reference lie. Its manifest lists them, but never says where: the reader does.

Of an added teacher, ``TARGETS/teachers/LABEL``, they lie in ``TARGETS``.
"""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.artifact import MANIFEST, AnyArtifact, TargetsArtifact
from cae2pipe.artifacts.file_checks import check_file, presence
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import file_size, file_sizes, folder_names, is_local
from cae2pipe.errors import DamageError, SettingsError, command
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.paths import TEACHERS_FOLDER

SAY = (
    "--pixels FOLDER (of pretrain: --set data.pixels=FOLDER, or probe.pixels for --probe-targets; in Python: "
    "TargetSet(path, pixels=FOLDER))"
)


def parent_set(root: Path) -> Path | None:
    """The target set that ``root`` is an added teacher of; None if it is none."""
    root = root.absolute() if is_local(root) else root
    parent = root.parent.parent
    return parent if root.parent.name == TEACHERS_FOLDER and file_size(parent / MANIFEST) is not None else None


def is_added(root: Path, parent: Path) -> bool:
    """Whether ``root`` is the folder of a teacher that is, or is to be, added to the local set ``parent``."""
    return root.resolve().parent == (parent / TEACHERS_FOLDER).resolve()


def added_sets(root: Path) -> list[Path]:
    """The sets of the teachers that were added to the set ``root``, by label."""
    folders = [root / TEACHERS_FOLDER / name for name in folder_names(root / TEACHERS_FOLDER)]
    return [folder for folder in folders if file_size(folder / MANIFEST) is not None]


def shared_pixels(artifact: AnyArtifact) -> dict[str, FileEntry]:
    """The files with pixels that a set by reference lists; none of other folders."""
    if not isinstance(artifact, TargetsArtifact) or not artifact.by_reference:
        return {}
    units = (unit for unit in artifact.units.values() if "shard" in unit)
    return {path: entry for unit in units for path, entry in unit.get("pixels", {}).items()}


def find_pixels(artifact: TargetsArtifact, given: Path | None) -> tuple[Path | None, list[DamageError]]:
    """The folder with a set's pixels, and what is missing there, or has another size. None: it must be given.

    Args:
        given: the folder that the reader named.

    Raises:
        SettingsError: ``given`` holds none of them, or the set holds its pixels itself.
    """
    root = artifact.root
    if not artifact.by_reference:
        if given not in (None, root):
            raise SettingsError(
                "this target set holds its pixels itself, and a folder with pixels is given",
                where=root,
                fix="omit pixels (--pixels, or data.pixels)",
            )
        return root, []
    files, folder = shared_pixels(artifact), given or parent_set(root)
    if folder is None:
        return None, []
    if given is not None and is_local(given) and not given.exists():
        raise SettingsError("there is no such folder", where=given, fix=f"check the path of {SAY}")
    sizes = None if is_local(folder) else file_sizes(folder)
    there = presence(folder, sizes)
    lacking = {path: entry for path, entry in files.items() if not there({path: entry})}
    if lacking and len(lacking) == len(files):
        if given is None:  # the set that the teacher was added to is one by reference itself
            return None, []
        raise SettingsError(
            f"this folder has none of the {counted(len(files), 'file')} with the pixels of {root}, such as "
            f"{min(files)}",
            where=given,
            fix=f"give the folder of the target set that it was made from: {SAY}",
        )
    repair = command("verify", folder, "--repair")
    fix = f"give the folder with the right pixels: {SAY}; or, if they are damaged: {repair}"
    problems = []
    for path, entry in lacking.items():
        if problem := check_file(folder / path, entry, digests=False):
            problem.fix = fix
            problems.append(problem)
    return folder, problems


def no_pixels(root: Path, tar: str) -> SettingsError:
    """The error where pixels are needed, such as the file ``tar``, and nobody said where those are."""
    return SettingsError(
        f"this target set holds latents alone; its pixels, such as {tar}, lie in the target set that it was made from",
        where=root,
        fix=f"give the folder of that set: {SAY}",
    )


def refers_to_nothing(source: Path) -> SettingsError:
    """The error where a set by reference is asked of a source that is no target set."""
    return SettingsError(
        "a set by reference is made from a target set, which has the pixels, and this is none",
        where=source,
        fix="give the target set as the source, or omit --by-reference",
    )
