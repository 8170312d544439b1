"""Copy a shard set or a target set between disks and object stores.

Read from top to bottom: open the set, refuse a destination that holds anything else or is too small, plan what is
missing there, let threads copy it, write the manifest. Every file is compared with the manifest on the way. Readers of
the destination see what was there before until the last file has arrived: the manifest is written then, and only then.
Finished units are marked in ``.copying/`` meanwhile, so that the same command resumes without reading them again.

A shard set inside a target set is copied with it, and so are the sets of added teachers.

Not named ``copy.py``: if this were the current folder, Python would import it instead of the standard library's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cae2pipe.artifacts.artifact import (
    MANIFEST,
    Artifact,
    ShardsArtifact,
    TargetsArtifact,
    is_artifact,
    open_artifact,
    refuse_foreign,
)
from cae2pipe.artifacts.atomic import remove_any, remove_debris, write_bytes
from cae2pipe.artifacts.difference import abridged, first_difference
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.file_checks import check_file, presence
from cae2pipe.artifacts.inside import inside
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.manifest_values import FileEntry, Unit
from cae2pipe.artifacts.storage import file_size, file_sizes, free_bytes, is_local, read_many, remove
from cae2pipe.artifacts.transfer import MARKS, copy_file
from cae2pipe.errors import BadInputError, Cae2pipeError, DamageError, MismatchError, SettingsError, command
from cae2pipe.runtime.progress import BYTES, Report, gigabytes
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.shard_set import REJECTS
from cae2pipe.targets.paths import CODEC, SHARDS_FOLDER, TEACHERS_FOLDER, is_store, of_store
from cae2pipe.targets.shared_pixels import added_sets

POLL = 0.2
"""Seconds between updates of the progress."""
WORKERS = 8
"""Threads by default: they wait for disks and networks."""

AnySet = Artifact[Any, Any, Any]


@dataclass(frozen=True)
class Copied:
    """The result of ``copy``.

    Args:
        path: the copy. kind: ``targets`` or ``shards``.
        files: of the copy, with those of sets inside. brought: how many of them this call has copied, of that
            many bytes.
        complete: whether it holds everything that the set is to hold: all views of all shards, or all images.
        views: where it has all that was requested of a complete set, but not all views: how many, and of how many.
    """

    path: Path
    kind: str
    files: int
    brought: int
    bytes: int
    complete: bool
    views: tuple[int, int] | None = None

    def summary(self) -> str:
        what = f"{counted(self.brought, 'file')} copied, {gigabytes(self.bytes)}" if self.brought else "nothing to copy"
        state = "is complete" if self.complete else "is not complete: copy again when the original has more"
        if self.views:
            state = f"holds {self.views[0]} of {counted(self.views[1], 'view')}"
        return f"{self.path}: {what}; this {self.kind} folder has {counted(self.files, 'file')} and {state}"


@dataclass(frozen=True)
class Plan:
    """What a set lacks at its destination.

    ``there``: the destination's artifact, as before; ``listed``: the sizes of its files, if it is remote. ``names``:
    the units that it will have from ``source``; ``todo``: those of them to copy, or to check.
    """

    source: AnySet
    there: AnySet
    listed: Mapping[str, int] | None
    names: list[str]
    todo: list[str]

    def has(self, path: str, entry: FileEntry) -> bool:
        """Whether the destination has a file of this size."""
        size = file_size(self.there.root / path) if self.listed is None else self.listed.get(path)
        return size == entry["bytes"]


class Tally:
    """Counts what threads move, and stops them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moved = self.brought = self.bytes = 0
        self.stopped = False

    def moved(self, count: int) -> None:
        """Count bytes. Raises StoppedError once the copy has failed elsewhere, or is interrupted."""
        if self.stopped:
            raise StoppedError("the copy has been stopped")
        with self._lock:
            self._moved += count

    def arrived(self, size: int) -> None:
        """Count a file."""
        with self._lock:
            self.brought += 1
            self.bytes += size

    def take(self) -> int:
        """Bytes since the last call."""
        with self._lock:
            count, self._moved = self._moved, 0
        return count


class StoppedError(Cae2pipeError):
    """A thread has been told to stop. Nobody sees this: what stopped it is raised instead."""


def copy_set(
    source: Path,
    out: Path,
    *,
    report: Report,
    views: int | None = None,
    check: bool = False,
    workers: int = WORKERS,
) -> Copied:
    """Copy, or resume copying, the set ``source`` to ``out``. The shard set inside a target set, and the sets of added
    teachers, are copied with it.

    Args:
        views: of a target set, only this many views of every image.
        check: also read the files that are there already, and copy those again that are damaged.
        workers: threads.

    Raises:
        ManifestError: ``source`` is not a shard or target set, or ``out`` holds something else. MismatchError: ``out``
            holds another set. DamageError: a file of ``source`` is damaged. BadInputError: too little room.
        LockedError: another process writes ``out``.
    """
    pairs = [(opened(source, views), out)]
    for folder in added_sets(source) if pairs[0][0].kind == "targets" else ():
        pairs.insert(0, (TargetsArtifact.open(folder), out / TEACHERS_FOLDER / folder.name))
    if is_artifact(source / SHARDS_FOLDER, "shards"):
        pairs.insert(0, (ShardsArtifact.open(source / SHARDS_FOLDER), out / SHARDS_FOLDER))
    refuse_overlap(source, out)
    refuse_hub(out)
    for artifact, folder in pairs:
        refuse_other(artifact, folder)
    check_space(pairs, views)
    with ExitStack() as locks:
        for _, folder in reversed(pairs):
            locks.enter_context(writing(folder))
        report.phase("comparing the sets")
        plans = [plan(artifact, folder, views, check) for artifact, folder in pairs]
        tally = Tally()
        copy_units(plans, tally, report=report, workers=workers)
        for each in plans:
            finish(each)
    complete = all(each.there.complete for each in plans)
    files = sum(len(unit["files"]) for each in plans for unit in each.there.units.values())
    held = None
    if not complete and all(each.source.complete for each in plans):
        held = view_count(plans[-1].there), view_count(plans[-1].source)
    return Copied(out, pairs[-1][0].kind, files, tally.brought, tally.bytes, complete, held)


def view_count(artifact: AnySet) -> int:
    """How many views of its images a target set has."""
    return len({of_store(name).view for name in artifact.units if is_store(name)})


def opened(source: Path, views: int | None) -> AnySet:
    """The set to copy.

    Raises:
        BadInputError: the folder is of another kind. SettingsError: views of a set that has none.
    """
    artifact = open_artifact(source)
    if not isinstance(artifact, ShardsArtifact | TargetsArtifact):
        raise BadInputError(
            f"this is a folder of kind {artifact.kind!r}, and shard sets and target sets are copied",
            where=source,
            fix="copy its files with the tools of your system, such as `cp -r` or `aws s3 cp --recursive`",
        )
    if views is not None and artifact.kind != "targets":
        raise SettingsError("a shard set has no views", where="views (--views)", fix="omit --views")
    if views is not None and views < 1:
        raise SettingsError(f"invalid --views {views}", where="views (--views)", fix="give 1 or more")
    return artifact


def refuse_overlap(source: Path, out: Path) -> None:
    """Raise BadInputError if one of the folders is, or is inside of, the other."""
    one, other = _parts(source), _parts(out)
    if one[: len(other)] == other or other[: len(one)] == one:
        what = "the destination is the set itself" if one == other else "the set and the destination overlap"
        raise BadInputError(what, where=out, fix="give a destination elsewhere")


def _parts(path: Path) -> tuple[str, ...]:
    if is_local(path):
        return path.resolve().parts
    remote = cast(Any, path)
    return (f"{remote.protocol}:", *str(remote.path).strip("/").split("/"))


def refuse_hub(out: Path) -> None:
    """Raise BadInputError for a repository of the Hugging Face Hub, which would get a commit for every file."""
    if not is_local(out) and cast(Any, out).protocol == "hf" and _parts(out)[1] != "buckets":
        raise BadInputError(
            "the hub makes a commit of every file that is written by its URL, and limits their number",
            where=out,
            fix="copy to a local folder, and upload that: `hf upload ORG/NAME FOLDER . --repo-type dataset`",
        )


def refuse_other(artifact: AnySet, out: Path) -> None:
    """Refuse a destination that holds anything but this set, or a part of it. Nothing is written.

    Raises:
        ManifestError: it holds other files. MismatchError: it holds another set.
    """
    if file_size(out / MANIFEST) is None:
        refuse_foreign(out, f"give a new or an empty folder, such as {out / artifact.root.name}")
        return
    there = open_artifact(out)
    for field in ("kind", "format", "identity"):
        if different := first_difference({field: getattr(there, field)}, {field: getattr(artifact, field)}):
            name, before, now = different[0].removeprefix("identity."), *different[1:]
            raise _another(out, f"its {name} is {abridged(before)}, that of {artifact.root} is {abridged(now)}")
    for name in sorted(there.units.keys() & artifact.units.keys()):
        # The list of rejected images is replaced when a set grows.
        if name != REJECTS and there.units[name] != artifact.units[name]:
            raise _another(out, f"its {name} differs from that of {artifact.root}")


def _another(out: Path, how: str) -> MismatchError:
    return MismatchError(
        f"the destination holds another set: {how}", where=out, fix="give another destination, or remove what is there"
    )


def chosen(artifact: AnySet, views: int | None) -> list[str]:
    """The units to copy, sorted."""
    return [
        name for name in sorted(artifact.units) if views is None or not is_store(name) or of_store(name).view < views
    ]


def plan(artifact: AnySet, out: Path, views: int | None, check: bool) -> Plan:
    """Open or create the destination's artifact, and list what it lacks."""
    there = type(artifact).open_or_create(
        out, artifact.identity, facts=artifact.facts, fix="give another destination", format=artifact.format
    )
    if is_local(out):
        remove_debris(out)
    names = chosen(artifact, views)
    listed = None if is_local(out) else file_sizes(out)
    marks, present = read_marks(out), presence(out, listed)

    def done(name: str, unit: Unit) -> bool:
        known = name in there.units and there.units[name] == unit
        return (known or marks.get(name) == mark(unit)) and present(unit["files"])

    todo = [name for name in names if check or not done(name, artifact.units[name])]
    return Plan(artifact, there, listed, names, todo)


def mark(unit: Unit) -> bytes:
    """The content of a unit's mark."""
    return fingerprint(unit).encode()


def read_marks(out: Path) -> dict[str, bytes]:
    """The marks of a destination, by the names of their units."""
    marks = read_many([out / MARKS / name for name in file_sizes(out / MARKS)])
    return {path.relative_to(out / MARKS).as_posix(): data for path, data in marks.items()}


def check_space(pairs: list[tuple[AnySet, Path]], views: int | None) -> None:
    """Raise BadInputError if the destination's disk has no room for the files that are not there."""
    out = pairs[-1][1]
    free = free_bytes(out)
    if free is None:
        return
    needed = 0
    for artifact, folder in pairs:
        for name in chosen(artifact, views):
            for path, entry in artifact.units[name]["files"].items():
                if file_size(folder / path) != entry["bytes"]:
                    needed += entry["bytes"]
    if needed > free:
        raise BadInputError(
            f"the copy needs {gigabytes(needed)}, and {gigabytes(free)} are free",
            where=out,
            fix="free some space, give a folder on another disk, or copy fewer --views",
        )


def copy_units(plans: list[Plan], tally: Tally, *, report: Report, workers: int) -> None:
    """Copy what is missing. Raises as ``copy_set``."""
    sizes = [sum(map(_bytes, (each.source.units[name] for name in each.names))) for each in plans]
    missing = [sum(map(_bytes, (each.source.units[name] for name in each.todo))) for each in plans]
    report.phase("copying")
    report.total(sum(sizes), BYTES, done=sum(sizes) - sum(missing))
    # The calibration comes first, since its name does: without it no view can be read.
    tasks = ((each, name) for each in plans for name in each.todo)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending: set[Future[None]] = set()
        try:
            for each, name in tasks:
                pending.add(pool.submit(copy_unit, each, name, tally))
                while len(pending) >= 2 * max(1, workers):
                    pending = _wait(pending, tally, report)
            while pending:
                pending = _wait(pending, tally, report)
        except BaseException:
            tally.stopped = True
            for future in pending:
                future.cancel()
            raise


def _bytes(unit: Unit) -> int:
    return sum(entry["bytes"] for entry in unit["files"].values())


def _wait(pending: set[Future[None]], tally: Tally, report: Report) -> set[Future[None]]:
    """Wait for one of the units, and tell of the progress. Returns those that are left."""
    done, left = wait(pending, POLL, FIRST_COMPLETED)
    if moved := tally.take():
        report.advance(moved)
    for future in done:
        future.result()
    return left


def copy_unit(plan: Plan, name: str, tally: Tally) -> None:
    """Copy the files of a unit that are not there, byte for byte, and mark it."""
    unit, source, out = plan.source.units[name], plan.source.root, plan.there.root
    for path, entry in unit["files"].items():
        tally.moved(0)
        if plan.has(path, entry) and check_file(out / path, entry) is None:
            tally.moved(entry["bytes"])
            continue
        try:
            copy_file(source, out, path, entry=entry, moved=tally.moved)
        except DamageError as error:
            error.fix = f"`{command('verify', source)}` lists what is damaged there, and with --repair rebuilds it"
            raise
        tally.arrived(entry["bytes"])
    write_bytes(inside(out, f"{MARKS}/{name}"), mark(unit))


def finish(plan: Plan) -> None:
    """Write the manifest of the destination, which now has all units, and remove the marks."""
    there, source = plan.there, plan.source
    before = set(there.units)
    for name in plan.names:
        if name not in there.units:
            there.units[name] = source.units[name]
        elif there.units[name] != source.units[name]:
            there.add(name, source.units[name])
    if before <= source.units.keys():
        there.add_facts(source.facts)
        complete = source.complete and source.units.keys() <= there.units.keys()
    else:  # the destination has more than this set, such as other parts
        there.add_facts({**source.facts, **there.facts})
        complete = there.complete or has_all(there)
    there.save(complete=complete)
    if is_local(there.root):
        remove_any(there.root / MARKS)
    else:
        remove([there.root / MARKS / name for name in file_sizes(there.root / MARKS)])


def has_all(artifact: AnySet) -> bool:
    """Whether a target set has all views and images that it was to have."""
    wanted: Mapping[str, int] | None = artifact.facts.get("wanted")
    if wanted is None or CODEC not in artifact.units:
        return False
    stores = sum(is_store(name) and of_store(name).view < wanted["views"] for name in artifact.units)
    images = sum(name.startswith("images/") for name in artifact.units)
    return stores == wanted["views"] * wanted["shards"] and images in (0, wanted["shards"])
