"""Target sets of several teachers over the same views, joined store by store.

Views are a pure function of settings, seed and key, so sets that were made apart hold the same pixels. A store of two
sets is the same if its name, the SHA-256 of the tar with its pixels, and that of its records (keys, labels, draws) are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cae2pipe.artifacts.difference import abridged, first_difference
from cae2pipe.artifacts.manifest_targets import listed
from cae2pipe.errors import MismatchError, SettingsError, command
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.paths import images_name
from cae2pipe.targets.records import SAMPLES
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.labels import label, spelling, teacher_key

T = TypeVar("T")


@dataclass(frozen=True)
class Joined:
    """Sets with the same stores. Pixels, keys, labels and masks are those of ``main``, the first; from ``others`` only
    latents are read. ``whole``: all sets with all of their stores. ``note``: what was narrowed, for the log; None if
    nothing was."""

    main: TargetSet
    others: tuple[TargetSet, ...] = ()
    whole: tuple[TargetSet, ...] = ()
    note: str | None = None

    @property
    def sets(self) -> tuple[TargetSet, ...]:
        """All of them, narrowed to the common stores."""
        return self.main, *self.others

    def only(self, stores: Collection[str]) -> Joined:
        """The same with only some of the stores, which the caller has chosen: without a note."""
        narrowed = tuple(other.only(stores) for other in self.others)
        return replace(self, main=self.main.only(stores), others=narrowed, note=None)


def join_sets(sets: Sequence[TargetSet]) -> Joined:
    """The stores that all of some sets have.

    Raises:
        SettingsError: a teacher is there twice, or grids differ. MismatchError: the sets have no store in common; the
        message says why.
    """
    main, *others = sets
    if not others:
        return Joined(main, whole=(main,))
    refuse_teacher_twice(sets)
    for other in others:
        if (other.teacher.rows, other.teacher.cols) != (main.teacher.rows, main.teacher.cols):
            raise SettingsError(
                f"grid mismatch: {main.teacher.rows} x {main.teacher.cols} patches of {main.teacher.name} and "
                f"{other.teacher.rows} x {other.teacher.cols} of {other.teacher.name}",
                where=str(other.root),
                fix=f"make its targets with --set 'teacher.grid=[{main.teacher.rows},{main.teacher.cols}]'",
            )
    common = sorted(main.stores)
    for other in others:
        same = [name for name in common if name in other.stores and same_store(main, other, name)]
        # Sets that keep equal images may cut other views from them.
        if not same or drawing(main) != drawing(other):
            raise nothing_common(main, other)
        common = same
    held = [len(each.stores) for each in sets]
    note = None
    if any(count > len(common) for count in held):
        having = ", ".join(f"{name} {count}" for name, count in zip(labels_of(sets), held, strict=True))
        note = f"using the {counted(len(common), 'store')} that all target sets have (stores: {having})"
    return Joined(main.only(common), tuple(other.only(common) for other in others), tuple(sets), note)


def located(joined: Joined, given: str | Path | None) -> Joined:
    """The same sets, all of which know the folder with their pixels: as given, or that of another set, since all have
    the same pixels.

    Raises:
        SettingsError: it is not known, or given and no set is one by reference.
    """
    if not any(each.artifact.by_reference for each in joined.sets):
        TargetSet(joined.main.root, pixels=given)
        return joined
    folder = given or next((each.pixels_folder for each in joined.sets if each.pixels_folder), None)

    def opened(targets: TargetSet) -> TargetSet:
        if not targets.artifact.by_reference:
            return targets
        again = TargetSet(targets.root, pixels=folder)
        _ = again.pixels_root
        return again.only(targets.stores)

    main, *others = map(opened, joined.sets)
    return replace(joined, main=main, others=tuple(others))


def labels_of(sets: Sequence[TargetSet]) -> list[str]:
    """The labels of the sets' teachers, each once."""
    labels: list[str] = []
    for each in sets:
        labels.append(label(each.artifact.identity, labels))
    return labels


def refuse_teacher_twice(sets: Sequence[TargetSet]) -> None:
    """Raise SettingsError if two sets hold the latents of one teacher."""
    seen: list[tuple[Any, TargetSet]] = []
    for each in sets:
        who = teacher_key(each.artifact.identity)
        for known, first in seen:
            if known == who:
                raise SettingsError(
                    f"a teacher twice: {each.label}",
                    where=f"{first.root}, {each.root}",
                    fix="give one target set of each teacher",
                )
        seen.append((who, each))


def drawing(targets: TargetSet) -> dict[str, Any]:
    """What views depend on besides their images."""
    settings: Mapping[str, Any] = targets.artifact.identity["settings"]
    return {"view": targets.view.model_dump(mode="json"), "seed": settings.get("seed", 0)}


def same_store(main: TargetSet, other: TargetSet, name: str) -> bool:
    """Whether two sets have the same views in a store: equal pixels and records."""
    return store_digests(main, name) == store_digests(other, name)


def store_digests(targets: TargetSet, name: str) -> tuple[str | None, str | None]:
    """SHA-256 of a store's tar and of its records. A set by reference lists files with pixels apart."""
    unit = targets.stores[name]
    files = listed(unit)
    if unit["tar"] not in files and (images := images_name(unit["shard"])) in targets.artifact.units:
        files |= listed(targets.artifact.units[images])
    tar, records = files.get(unit["tar"]), files.get(f"{unit['zarr']}/{SAMPLES}/c/0/0")
    return tar and tar["sha256"], records and records["sha256"]


def nothing_common(main: TargetSet, other: TargetSet) -> MismatchError:
    """The error for sets without a common store: it says what differs."""
    if difference := first_difference(drawing(main), drawing(other)):
        name, one, two = difference
        what = f"their views differ: {name} is {abridged(one)} and {abridged(two)}"
    elif not main.stores.keys() & other.stores.keys():
        what = "they have no shard in common"
    else:
        what = "they were made from other images, or from other shards of them"
    teacher = ("--teacher", spelling(other.artifact.identity))
    pixels = ("--pixels", main.pixels_folder or "FOLDER") if main.artifact.by_reference else ()
    again = command("extract-targets", main.root, "OUT", *teacher, *pixels)
    return MismatchError(
        f"the target sets have no views in common: {what}",
        where=f"{main.root}, {other.root}",
        fix=f"make the second from the stored views of the first: `{again}`, with @FILE behind the teacher if its "
        "weights are a local file",
    )


def prefix_of(number: int) -> str:
    """What is in front of the names of a teacher's arrays; nothing for the first."""
    return f"teacher-{number}/" if number else ""


def of_teacher(number: int, arrays: Mapping[str, T]) -> dict[str, T]:
    """The arrays of one teacher among those of several, under their own names."""
    if not number:
        return {name: array for name, array in arrays.items() if not name.startswith("teacher-")}
    start = prefix_of(number)
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
