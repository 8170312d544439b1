"""An artifact: one folder made by one command, described by its ``manifest.json``.

The manifest holds

- ``format``: the version of the layout;
- ``kind``: ``shards``, ``targets``, ``run`` or ``scores``;
- ``identity``: what the content depends on (settings, digests of inputs), and ``fingerprint``, its SHA-256;
- ``units``: the independent pieces of the content by name, each with ``files``: path -> bytes and SHA-256;
- facts of the kind (class names, teacher, codec, ...), and ``complete``;
- ``digest``: of the manifest itself.

``manifest_*.py`` define what each kind may hold. Everything written or read is checked against the same models, so the
code never sees a name, path, type or number that they do not allow.

A unit is written first, then its entry in ``journal/``: the unit exists once the entry is there. At the end of a run
the journal is merged into the manifest. A killed run leaves a journal, which is as valid as the manifest: readers merge
both. Several processes may add units at the same time; only one at a time merges. Neither journal nor manifest holds
times, host names or absolute paths, so equal inputs give equal bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Generic, Self

from cae2pipe.artifacts.atomic import remove_empty, write_bytes
from cae2pipe.artifacts.difference import Fix, abridged, differences
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.file_checks import check_file, presence
from cae2pipe.artifacts.inside import inside
from cae2pipe.artifacts.lock import holding
from cae2pipe.artifacts.manifest import FORMATS, GROUPED, REFERRING, decode_unit, encode_unit
from cae2pipe.artifacts.manifest_files import JOURNAL, made_by, manifest_of, read_folder, write_manifest
from cae2pipe.artifacts.manifest_files import MANIFEST as MANIFEST
from cae2pipe.artifacts.manifest_files import is_foreign as is_foreign
from cae2pipe.artifacts.manifest_files import journal_entries as journal_entries
from cae2pipe.artifacts.manifest_files import refuse_foreign as refuse_foreign
from cae2pipe.artifacts.manifest_kinds import (
    RUN,
    SCORES,
    SHARDS,
    TARGETS,
    FactsT,
    IdentityT,
    Kind,
    Manifest,
    ShardsUnit,
    TargetsUnit,
    UnitT,
)
from cae2pipe.artifacts.manifest_run import EncoderUnit, RunFacts, RunIdentity
from cae2pipe.artifacts.manifest_scores import ResultUnit, ScoresFacts, ScoresIdentity
from cae2pipe.artifacts.manifest_shards import ShardsFacts, ShardsIdentity
from cae2pipe.artifacts.manifest_targets import TargetsFacts, TargetsIdentity
from cae2pipe.artifacts.manifest_values import Unit
from cae2pipe.artifacts.storage import file_size, is_local, make_folder, remove
from cae2pipe.artifacts.units import Units
from cae2pipe.errors import DamageError, ManifestError, MismatchError, command


class Artifact(ABC, Generic[IdentityT, UnitT, FactsT]):
    """A folder with a manifest. ``facts`` are the manifest's other keys.

    Args:
        format: of the manifest; None: the format of new folders.
    """

    def __init__(
        self,
        root: Path,
        identity: IdentityT,
        units: Mapping[str, UnitT],
        *,
        facts: FactsT,
        complete: bool = False,
        format: int | None = None,
    ):
        self.root = root
        self.identity = identity
        self.units = Units.of(units)
        self.facts = facts
        self.complete = complete
        self.format = FORMATS[self.rules().name] if format is None else format

    @staticmethod
    @abstractmethod
    def rules() -> Kind[IdentityT, UnitT, FactsT]:
        """The rules for folders of this kind."""

    @classmethod
    def open(cls, root: Path) -> Self:
        """Read a folder's manifest and journal.

        Raises:
            ManifestError: no manifest, or one that is damaged, or of another format or kind.
        """
        return cls.of(root, *read_folder(root, cls.rules().name))

    @classmethod
    def open_whole(cls, root: Path) -> tuple[Self, set[str]]:
        """Open a folder, and find the units that ``whole`` would, without parsing all of them again.

        Raises as ``open``.
        """
        there, found = presence(root), set()

        def check(name: str, unit: Unit) -> None:
            if there(unit["files"]):
                found.add(name)

        artifact = cls.of(root, *read_folder(root, cls.rules().name, check))
        for name in artifact.units:
            unit = artifact.units.kept(name)
            if isinstance(unit, dict):  # of the journal, or of a manifest in another layout
                found.discard(name)
                check(name, artifact.units[name])
        return artifact, found

    @classmethod
    def open_or_create(
        cls,
        root: Path,
        identity: Mapping[str, object],
        *,
        facts: Mapping[str, object],
        fix: Fix,
        completed: Callable[[Mapping[str, object]], Mapping[str, object]] = dict,
        called: Callable[[str], str] = str,
        format: int | None = None,
        restart: bool = False,
    ) -> Self:
        """Open an artifact to resume it, or start a new one.

        Args:
            fix: what to do if the identity differs.
            completed: identities as they are compared: with what manifests of older versions do not say.
            called: the name for an error of a field of the identity, given its dotted name.
            format: of a new manifest; None: the newest.
            restart: replace an artifact without units by a new one.

        Raises:
            MismatchError: the folder was made with another identity; the first field that differs is named.
            ManifestError: the folder holds something else.
        """
        make_folder(root)
        kind = cls.rules().name
        with holding(root, "manifest"):
            there = file_size(root / MANIFEST) is not None
            if not there or (restart and not cls.open(root).units):
                refuse_foreign(root)
                form = FORMATS[kind] if format is None else format
                new = manifest_of(kind, form, identity, units={}, facts=facts, complete=False)
                write_manifest(root, kind, form, manifest=new)
        return cls.open_same(root, identity, fix, completed=completed, called=called)

    @classmethod
    def open_same(
        cls,
        root: Path,
        identity: Mapping[str, object],
        fix: Fix,
        *,
        completed: Callable[[Mapping[str, object]], Mapping[str, object]] = dict,
        called: Callable[[str], str] = str,
    ) -> Self:
        """Open an artifact that was made with this identity. Raises as ``open_or_create``."""
        artifact = cls.open(root)
        if found := list(differences(completed(artifact.identity), completed(identity))):
            name, old, now = found[0]
            raise MismatchError(
                f"this folder was made with {called(name)} = {abridged(old)}, and {abridged(now)} is requested now",
                where=root / MANIFEST,
                fix=fix if isinstance(fix, str) else fix(found),
            )
        return artifact

    @classmethod
    def of(cls, root: Path, manifest: Manifest, journal: Mapping[Path, bytes]) -> Self:
        """The artifact that a manifest and journal entries describe. Raises ManifestError for another kind."""
        own = cls.rules().own(manifest)
        if own is None:
            raise ManifestError(
                f"this is a folder of kind {manifest['kind']!r}, expected {cls.rules().name!r}",
                where=root,
                fix=made_by(cls.rules().name),
            )
        units = Units.of(own["units"])
        for entry, data in journal.items():
            name = entry.relative_to(root / JOURNAL).as_posix().removesuffix(".json")
            units[name] = decode_unit(cls.rules(), own["format"], name, data=data, where=entry)
        facts = cls.rules().read_facts(manifest)
        return cls(root, own["identity"], units, facts=facts, complete=own["complete"], format=own["format"])

    @property
    def kind(self) -> str:
        return self.rules().name

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    def manifest(self) -> dict[str, object]:
        return manifest_of(
            self.kind, self.format, self.identity, units=self.units, facts=self.facts, complete=self.complete
        )

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """Set some of the manifest's other keys. Raises ValidationError if they do not fit the kind's model."""
        self.facts = self.rules().read_facts({**self.facts, **facts})

    def add(self, name: str, unit: UnitT) -> None:
        """Register a finished unit: its files must already have their final names."""
        path = inside(self.root, f"{JOURNAL}/{name}.json")
        write_bytes(path, encode_unit(self.rules(), self.format, name, unit=unit, where=path))
        self.units[name] = unit

    def has(self, name: str) -> bool:
        """Whether a unit exists and its files have the right sizes. Changed bytes are found by `cae2pipe verify`."""
        files = self.units[name]["files"] if name in self.units else None
        return files is not None and not any(
            check_file(self.root / path, entry, digests=False) for path, entry in files.items()
        )

    def whole(self) -> set[str]:
        """Names of all units for which ``has`` is true."""
        there = presence(self.root)
        return {name for name, unit in self.units.items() if there(unit["files"])}

    def save(self, *, complete: bool | Callable[[Self], bool] | None = None) -> None:
        """Write the manifest, with units that other processes have added meanwhile, unless it is up to date.

        Journal entries that it now contains are removed. ``complete`` may be a function of the merged artifact.
        """
        with holding(self.root, "manifest"):
            folded = []
            if file_size(self.root / MANIFEST) is not None:
                folded = journal_entries(self.root)
                latest = self.open(self.root)
                self.units = self.units.merged(latest.units)
                self.facts = self.rules().read_facts({**latest.facts, **self.facts})
            if complete is not None:
                self.complete = complete(self) if callable(complete) else complete
            write_manifest(self.root, self.kind, self.format, manifest=self.manifest())
            remove(folded)
        if is_local(self.root):
            remove_empty(self.root / JOURNAL)


class ShardsArtifact(Artifact[ShardsIdentity, ShardsUnit, ShardsFacts]):
    """A shard set's folder."""

    @staticmethod
    def rules() -> Kind[ShardsIdentity, ShardsUnit, ShardsFacts]:
        return SHARDS


class TargetsArtifact(Artifact[TargetsIdentity, TargetsUnit, TargetsFacts]):
    """A target set's folder."""

    @staticmethod
    def rules() -> Kind[TargetsIdentity, TargetsUnit, TargetsFacts]:
        return TARGETS

    @classmethod
    def of(cls, root: Path, manifest: Manifest, journal: Mapping[Path, bytes]) -> Self:
        """As of other kinds. Raises ManifestError also for a set of an earlier format."""
        artifact = super().of(root, manifest, journal)
        if artifact.format < GROUPED:
            raise ManifestError(
                f"this target set has format {artifact.format}, and this version of cae2pipe reads format {GROUPED}",
                where=root,
                fix=f"{command('recode', root, 'NEW', '--repack')} converts it, losslessly and without the teacher",
            )
        return artifact

    @property
    def by_reference(self) -> bool:
        """Whether the set lists its files with pixels, which lie elsewhere, but does not hold them."""
        return self.format >= REFERRING

    @classmethod
    def open_earlier(cls, root: Path) -> Self:
        """Open a set of an earlier format, to convert it.

        Raises:
            ManifestError: as ``open``, or the set has today's format.
        """
        artifact = super().of(root, *read_folder(root, cls.rules().name))
        if artifact.format >= GROUPED:
            raise ManifestError("this target set already has the newest format", where=root, fix="use it as it is")
        return artifact


class RunArtifact(Artifact[RunIdentity, EncoderUnit, RunFacts]):
    """A run's folder."""

    @staticmethod
    def rules() -> Kind[RunIdentity, EncoderUnit, RunFacts]:
        return RUN


class ScoresArtifact(Artifact[ScoresIdentity, ResultUnit, ScoresFacts]):
    """An evaluation's folder."""

    @staticmethod
    def rules() -> Kind[ScoresIdentity, ResultUnit, ScoresFacts]:
        return SCORES


AnyArtifact = ShardsArtifact | TargetsArtifact | RunArtifact | ScoresArtifact
ARTIFACTS: dict[str, type[ShardsArtifact] | type[TargetsArtifact] | type[RunArtifact] | type[ScoresArtifact]] = {
    SHARDS.name: ShardsArtifact,
    TARGETS.name: TargetsArtifact,
    RUN.name: RunArtifact,
    SCORES.name: ScoresArtifact,
}


def is_artifact(root: Path, kind: str | None = None) -> bool:
    """Whether ``root`` has a manifest of cae2pipe (of that kind). Raises as ``open_artifact`` if it is damaged."""
    if file_size(root / MANIFEST) is None:
        return False
    try:
        artifact = open_artifact(root)
    except ManifestError:
        if is_foreign(root):
            return False
        raise
    return kind is None or artifact.kind == kind


def open_artifact(root: Path) -> AnyArtifact:
    """Read the manifest and journal of a folder of any kind. Raises as ``Artifact.open``."""
    manifest, journal = read_folder(root, None)
    return ARTIFACTS[manifest["kind"]].of(root, manifest, journal)


def check_files(
    artifact: AnyArtifact, units: Iterable[str] | None = None, *, digests: bool = True
) -> list[DamageError]:
    """Compare the files of the given units (default: all) with the manifest: presence, size and, if asked, SHA-256."""
    problems = []
    for name in sorted(artifact.units) if units is None else units:
        for relative, entry in artifact.units[name]["files"].items():
            problem = check_file(artifact.root / relative, entry, digests=digests)
            if problem:
                problems.append(problem)
    return problems
