"""What a run's manifest records, and whether a folder's run is the one that the settings and sets describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from cae2pipe.artifacts.artifact import RunArtifact, TargetsArtifact, is_artifact
from cae2pipe.artifacts.difference import Difference
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.manifest_run import RunIdentity, SeveralTeacher
from cae2pipe.artifacts.manifest_targets import listed
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.config.resume_options import completed_as, resuming
from cae2pipe.errors import MismatchError, command
from cae2pipe.loading.joining import Joined, labels_of
from cae2pipe.loading.order import ORDER
from cae2pipe.loading.planning import chosen_stores
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.student import licences_of, teacher_of


class Initial(Protocol):
    """Initial weights: their name without folders, and their SHA-256."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


def run_identity(
    targets: TargetsArtifact,
    settings: PretrainSettings,
    init: Initial | None = None,
    others: Sequence[TargetSet] = (),
) -> RunIdentity:
    """What a run depends on."""
    identity: RunIdentity = {"settings": fingerprinted(settings), "targets": targets.fingerprint, "order": ORDER}
    if others:
        identity["teachers"] = [other.artifact.fingerprint for other in others]
    return {**identity, "init": init.digest} if init else identity


def refuse_earlier_order(out: Path) -> None:
    """Raise MismatchError if an earlier version, with another order of samples, began the run in this folder."""
    if not is_artifact(out, "run"):
        return
    run = RunArtifact.open(out)
    if run.identity.get("order", 1) == ORDER:
        return
    raise MismatchError(
        "an earlier version of cae2pipe, which takes samples in another order, "
        + ("made this run, and it is finished" if run.complete else "began this run"),
        where=out,
        fix="evaluate or export it as it is, or start a new run in another folder"
        if run.complete
        else "finish it with that version and the target set it was begun with, or start a new run in another folder",
    )


def refuse_other_sets(out: Path, sets: Sequence[TargetSet]) -> None:
    """Raise MismatchError if the run in this folder was begun with other sets, or with these in another order."""
    if not is_artifact(out, "run"):
        return
    run = RunArtifact.open(out)
    labels = {each["targets"]: each["label"] for each in run.facts.get("teachers", [])}
    others = {name: name[:8] for name in run.identity.get("teachers", [])}
    begun = {run.identity["targets"]: run.facts["teacher"]["name"]} | others | labels
    given = {each.artifact.fingerprint: each for each in sets}
    if list(given) == list(begun):
        return
    lost = {fingerprint: name for fingerprint, name in begun.items() if fingerprint not in given}
    new = {fingerprint: str(each.root) for fingerprint, each in given.items() if fingerprint not in begun}
    what = f"this run was begun with the targets of {', '.join(begun.values())}"
    if lost and new:
        # They may be of the same teacher.
        begun_with = ", ".join(f"{name[:8]} of {teacher}" for name, teacher in lost.items())
        what = f"this run was begun with other target sets: {begun_with}, in place of "
        what += ", ".join(f"{name[:8]} in {root}" for name, root in new.items())
        fix = "give the target sets that this run was begun with"
    elif lost:
        what += f", and those of {', '.join(lost.values())} are missing"
        fix = "give all of these target sets"
    else:
        what += f" alone, without {', '.join(new.values())}" if new else ", in this order"
        paths = (given[fingerprint].root for fingerprint in begun)
        fix = f"`{command('pretrain', *paths, out)}` with the same options"
    raise MismatchError(what, where=out, fix=f"{fix}; or use another output folder")


def open_run(out: Path, joined: Joined, settings: PretrainSettings, init: Initial | None = None) -> RunArtifact:
    """The run's artifact. A new one records its stores; an existing one must find them unchanged."""
    refuse_earlier_order(out)
    refuse_other_sets(out, joined.sets)
    targets, others = joined.main, joined.others
    names = chosen_stores(targets, settings)
    stores = digests_of(targets, names)
    artifact = RunArtifact.open_or_create(
        out,
        run_identity(targets.artifact, settings, init, others),
        facts={
            "stores": stores,
            "teacher": teacher_of(targets),
            "licences": licences_of(targets),
            **({"init": init.name} if init else {}),
            **({"teachers": teachers_of((targets, *others), names)} if others else {}),
        },
        fix=partial(run_remedy, out=out),
        completed=completed_as(PretrainSettings),
        called=lambda name: "model.init (SHA-256 of the weights)" if name == "init" else name,
    )
    known = [artifact.facts["stores"], *(other["stores"] for other in artifact.facts.get("teachers", [])[1:])]
    for each, recorded in zip(joined.whole, known, strict=True):
        refuse_changed(each, recorded)
    return artifact


def run_remedy(differences: Sequence[Difference], out: Path) -> str:
    """What to do if a run was begun with other settings or inputs."""
    name = differences[0].name
    if name == "settings.epochs":
        return (
            "to train longer, start a new run with more epochs in another output folder (a run cannot be extended: its "
            "learning rate falls over all epochs); to resume this one, use its own epochs"
        )
    if name == "init":
        return (
            "set model.init to the weights that this run started from, wherever they are now "
            f"(`{command('inspect', out)}` names them; null: there were none), or use another output folder"
        )
    return resuming(
        PretrainSettings,
        differences,
        "use another output folder, or the settings and target set that this run began with",
    )


def refuse_changed(targets: TargetSet, recorded: Mapping[str, str]) -> None:
    """Raise MismatchError if a store that a run started with has changed, or is no longer there."""
    stores = digests_of(targets, [name for name in recorded if name in targets.stores])
    for name, digest in recorded.items():
        if stores.get(name) != digest:
            what = "is no longer in" if name not in stores else "has changed in"
            raise MismatchError(
                f"store {name}, which this run started with, {what} the target set",
                where=targets.root,
                fix="restore the original target set, or start a new run in another folder",
            )


def digests_of(targets: TargetSet, names: Sequence[str]) -> dict[str, str]:
    """The fingerprints of some stores; the same wherever their pixels lie."""
    return {name: fingerprint(listed(targets.stores[name])) for name in names}


def teachers_of(sets: Sequence[TargetSet], names: Sequence[str]) -> list[SeveralTeacher]:
    """The entries of a run's manifest about several teachers. ``names``: of the stores that it trains on."""
    return [
        cast(
            SeveralTeacher,
            {
                **teacher_of(each),
                "label": label,
                "targets": each.artifact.fingerprint,
                "licences": licences_of(each),
                "stores": digests_of(each, names),
            },
        )
        for each, label in zip(sets, labels_of(sets), strict=True)
    ]
