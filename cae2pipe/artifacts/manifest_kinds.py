"""The kinds of manifest: the names and contents of their units, and their types.

The kind of a manifest is in its field ``kind``, that of a unit follows from its name. Both are resolved here, so code
that has a manifest of a kind also has the types of its contents.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cae2pipe.artifacts import manifest_run, manifest_scores, manifest_shards, manifest_targets
from cae2pipe.artifacts.manifest_run import EncoderUnit, RunFacts, RunIdentity, RunManifest
from cae2pipe.artifacts.manifest_scores import ResultUnit, ScoresFacts, ScoresIdentity, ScoresManifest
from cae2pipe.artifacts.manifest_shards import ListingUnit, ShardsFacts, ShardsIdentity, ShardsManifest, TarUnit
from cae2pipe.artifacts.manifest_targets import (
    CodecUnit,
    ImagesUnit,
    StoreUnit,
    TargetsFacts,
    TargetsIdentity,
    TargetsManifest,
)
from cae2pipe.artifacts.manifest_values import SHARD, VIEW, Unit

ShardsUnit = TarUnit | ListingUnit
TargetsUnit = StoreUnit | ImagesUnit | CodecUnit
Manifest = ShardsManifest | TargetsManifest | RunManifest | ScoresManifest

IdentityT = TypeVar("IdentityT", bound=Mapping[str, object])
UnitT = TypeVar("UnitT", bound=Unit)
FactsT = TypeVar("FactsT", bound=Mapping[str, object])


class ManifestOf(TypedDict, Generic[IdentityT, UnitT]):
    """A manifest as seen by code for all kinds."""

    format: int
    identity: IdentityT
    units: dict[str, UnitT]
    complete: bool


NO_FACTS = {"format", "kind", "identity", "fingerprint", "units", "complete"}


@dataclass(frozen=True)
class Kind(Generic[IdentityT, UnitT, FactsT]):
    """A kind of manifest.

    Args:
        own: returns the manifest if it is of this kind.
        unit_names: a regular expression. unit_model: the model of a unit, by its name. contradiction: how a valid
            unit contradicts its name, or itself; None if it does not.
        facts: the model of the manifest's other fields.
    """

    name: str
    own: Callable[[Manifest], ManifestOf[IdentityT, UnitT] | None]
    unit_names: re.Pattern[str]
    unit_model: Callable[[str], type[UnitT]]
    contradiction: Callable[[str, UnitT], str | None]
    facts: type[FactsT]

    def names(self, unit: str) -> bool:
        """Whether a unit may have this name."""
        return self.unit_names.fullmatch(unit) is not None

    def contradictory(self, manifest: Manifest) -> tuple[str, str] | None:
        """The first unit of a valid manifest of this kind that contradicts its name, or itself, and how."""
        own = self.own(manifest)
        for name, unit in own["units"].items() if own else ():
            if problem := self.contradiction(name, unit):
                return name, problem
        return None

    def read_unit(self, name: str, value: object) -> UnitT:
        """The unit of this name. Raises ValidationError if it does not fit its model."""
        return self._validator(name).validate_python(value)

    def parse_unit(self, name: str, data: bytes) -> UnitT | None:
        """The unit of this name from its JSON; None if no unit may have the name, or it contradicts its name or itself.

        Raises:
            ValidationError: it does not fit its model.
        """
        if not self.names(name):
            return None
        unit = self._validator(name).validate_json(data)
        return unit if self.contradiction(name, unit) is None else None

    def read_facts(self, fields: Mapping[str, object]) -> FactsT:
        """The facts among the fields of a manifest. Raises ValidationError if they do not fit their model."""
        return self._facts.validate_python({name: value for name, value in fields.items() if name not in NO_FACTS})

    def _validator(self, name: str) -> TypeAdapter[UnitT]:
        model = self.unit_model(name)
        if model not in self._units:
            self._units[model] = TypeAdapter(model)
        return self._units[model]

    @functools.cached_property
    def _units(self) -> dict[type[UnitT], TypeAdapter[UnitT]]:
        return {}  # each is built when the first of its units is read

    @functools.cached_property
    def _facts(self) -> TypeAdapter[FactsT]:
        return TypeAdapter(self.facts)


SHARDS: Kind[ShardsIdentity, ShardsUnit, ShardsFacts] = Kind(
    "shards",
    lambda manifest: manifest if manifest["kind"] == "shards" else None,
    re.compile(rf"{SHARD}|{manifest_shards.LISTING}|rejects"),
    manifest_shards.unit_model,
    manifest_shards.contradiction,
    ShardsFacts,
)
TARGETS: Kind[TargetsIdentity, TargetsUnit, TargetsFacts] = Kind(
    "targets",
    lambda manifest: manifest if manifest["kind"] == "targets" else None,
    re.compile(rf"codec|images/{SHARD}|{VIEW}/{SHARD}"),
    manifest_targets.unit_model,
    manifest_targets.contradiction,
    TargetsFacts,
)
RUN: Kind[RunIdentity, EncoderUnit, RunFacts] = Kind(
    "run",
    lambda manifest: manifest if manifest["kind"] == "run" else None,
    re.compile("encoder"),
    manifest_run.unit_model,
    manifest_run.contradiction,
    RunFacts,
)
SCORES: Kind[ScoresIdentity, ResultUnit, ScoresFacts] = Kind(
    "scores",
    lambda manifest: manifest if manifest["kind"] == "scores" else None,
    re.compile("result"),
    manifest_scores.unit_model,
    manifest_scores.contradiction,
    ScoresFacts,
)
AnyKind = (
    Kind[ShardsIdentity, ShardsUnit, ShardsFacts]
    | Kind[TargetsIdentity, TargetsUnit, TargetsFacts]
    | Kind[RunIdentity, EncoderUnit, RunFacts]
    | Kind[ScoresIdentity, ResultUnit, ScoresFacts]
)
KINDS: dict[str, AnyKind] = {kind.name: kind for kind in (SHARDS, TARGETS, RUN, SCORES)}


@functools.cache
def manifests() -> TypeAdapter[Manifest]:
    """The validator of manifests of any kind. Built on first use: not every command reads one."""
    return TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])
