"""Copies units from one artifact to another of the same kind, without change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cae2pipe.artifacts.artifact import Artifact
from cae2pipe.artifacts.manifest_kinds import FactsT, IdentityT, UnitT
from cae2pipe.artifacts.staging import staged
from cae2pipe.artifacts.storage import fetch_file
from cae2pipe.errors import DamageError
from cae2pipe.runtime.progress import Report


def copy_units(
    artifact: Artifact[IdentityT, UnitT, FactsT],
    source: Artifact[IdentityT, UnitT, FactsT],
    names: Iterable[str],
    *,
    fix: str,
    report: Report,
) -> None:
    """Copy units with their files: hard links if both artifacts are on one disk.

    Args:
        fix: what to do about a damaged source.

    Raises:
        DamageError: a file of the source is missing or has changed.
    """
    for name in names:
        copy_unit(artifact, source.root, name, unit=source.units[name], fix=fix)
        report.advance()


def copy_unit(artifact: Artifact[IdentityT, UnitT, FactsT], source: Path, name: str, *, unit: UnitT, fix: str) -> None:
    """Copy a unit, whose files lie in the folder ``source``. Raises as ``copy_units``."""
    with staged(artifact.root, name) as stage:
        try:
            for path in unit["files"]:
                fetch_file(source / path, stage.path(path))
        except FileNotFoundError:
            raise DamageError("stored data are missing", where=f"{source}, {name}", fix=fix) from None
        if stage.entries(*unit["files"]) != unit["files"]:
            raise DamageError("stored data are damaged", where=f"{source}, {name}", fix=fix)
        stage.commit(*unit["files"])
    artifact.add(name, unit)
