"""The report of a target set: read samples of it, optionally run its teacher again, write one page.

The set is only read. It may be incomplete; what is damaged is named on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cae2pipe.artifacts.artifact import MANIFEST, ShardsArtifact, is_artifact, open_artifact
from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.storage import file_size, is_local
from cae2pipe.errors import (
    BadInputError,
    Cae2pipeError,
    DamageError,
    ImageError,
    ManifestError,
    MismatchError,
    SettingsError,
    command,
)
from cae2pipe.images.decode import decode_rgb
from cae2pipe.reporting.output_folder import check_output
from cae2pipe.reporting.target_set_page import TargetSetContents, target_set_html
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.keyed import keyed_permutation, keyed_uniforms
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.threads import in_threads
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.auditing import choose, run_teacher_on
from cae2pipe.targets.coverage import class_counts, coverage, one_store_a_shard
from cae2pipe.targets.fidelity_profile import FidelityProfile, ProfileBuilder
from cae2pipe.targets.paths import SHARDS_FOLDER
from cae2pipe.targets.set_bytes import array_shape, set_bytes
from cae2pipe.targets.shared_pixels import parent_set
from cae2pipe.targets.store_layout import array_name
from cae2pipe.targets.stored_image import StoredImage, read_stored_image
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.teachers.protocol import Teacher

HTML = "report.html"
IMAGES, VIEWS = 6, 4
"""Numbers of images that are shown, and of views of each."""
WORST = 4
"""Number of views that are shown of those with the lowest cosine."""
LIVE = 256
"""Number of views that the page recommends to run the teacher on."""
READERS = 8
"""Number of threads that read labels: of a remote set, each store's labels take a round trip."""
SEED = 0


@dataclass(frozen=True)
class TargetSetReport:
    """A page about a target set: its path, and the problems with the set that it names."""

    page: Path
    problems: tuple[str, ...]


def only_target_set(paths: Sequence[Path]) -> Path | None:
    """The target set, if one is given instead of runs; None if all folders are runs.

    Raises:
        SettingsError: it is not the only folder. ManifestError: a manifest is damaged, or a folder is neither.
    """
    sets = [path for path in paths if is_artifact(path, "targets")]
    if sets and len(paths) > 1:
        raise SettingsError(
            "a report is about some runs, or about one target set",
            where=f"{sets[0]}, which is a target set",
            fix="give only the target set; for pictures in a report about runs, give it with --targets",
        )
    for path in paths if not sets else ():
        either = "give runs of `cae2pipe pretrain`, or one target set of `cae2pipe extract-targets`"
        try:
            kind = open_artifact(path).kind
        except ManifestError as error:
            raise ManifestError(error.what, where=error.where, fix=f"{error.fix}; {either}") from None
        if kind != "run":
            raise ManifestError(
                f"this is a folder of kind {kind!r}, expected 'run' or 'targets'", where=path, fix=either
            )
    return sets[0] if sets else None


def report_targets(
    root: Path,
    out: Path,
    *,
    report: Report,
    source: Path | None = None,
    live: int = 0,
    weights: Path | None = None,
    device: str = "auto",
    pixels: Path | None = None,
) -> TargetSetReport:
    """Write ``report.html`` about a target set into ``out``. Equal sets and arguments give equal bytes.

    Args:
        root: the set's folder or URL.
        source: the shard set that it was made from (default: the one inside the target set, if there is one).
        live: number of stored views to run the teacher on again, for the fidelity by component and token.
        weights: the teacher's weights file, if they came from one. device: where the teacher runs.
        pixels: the folder with the pixels of a set by reference.

    Raises:
        ManifestError: not a target set, or not a shard set. MismatchError: another source, or other weights.
        TeacherError: the teacher cannot be loaded. DamageError: the set's calibration, or all of its views, are
        damaged. BadInputError: as ``check_output``.
    """
    if live < 0:
        raise SettingsError(f"{live} stored views", where="live", fix="give 0, or the number of views")
    check_output(out)
    targets = TargetSet(root, damaged="omit", pixels=pixels)
    _ = targets.pixels_root
    problems = [f"{problem.where}: {problem.what}" for problem in targets.damage]
    originals = open_originals(targets, source, problems)
    profile = None
    if live:
        set_backends()
        teacher = set_teacher(targets.artifact, weights, pick_device(device), option="--teacher-weights FILE")
        profile = profile_fidelity(targets, teacher, live, report=report, problems=problems)
    images = [
        with_original(stored, originals, shard, position=position, problems=problems)
        for shard, position, stored in read_images(targets, report, problems)
    ]
    labels = read_labels(targets, report, problems)
    listed = [unit for unit in targets.artifact.units.values() if "view" in unit]
    contents = TargetSetContents(
        name=targets.root.name,
        root=str(root),
        identity=targets.artifact.identity,
        facts=targets.artifact.facts,
        format=targets.artifact.format,
        fingerprint=targets.artifact.fingerprint,
        view=targets.view,
        image_count=sum({unit["shard"]: unit["samples"] for unit in listed}.values()),
        fidelity=targets.fidelity(),
        stores=targets.stores,
        sizes=set_bytes(targets),
        array_shapes={
            array_name(group, name): array_shape(targets, array_name(group, name))
            for group, own in targets.groups.items()
            for name in own.layout.blocked()
        },
        coverage=coverage(targets, [shard.name for shard in originals.shards] if originals else ()),
        classes=class_counts(labels, targets.classes) if targets.classes else None,
        unlabelled=int((labels < 0).sum()),
        rejects=rejected(originals) if originals else None,
        images=images,
        originals=originals is not None,
        profile=profile,
        problems=problems,
        commands=commands(
            targets,
            root,
            source=source,
            live=live,
            weights=weights,
            inside=source is None and originals is not None,
        ),
    )
    write_bytes(out / HTML, target_set_html(contents).encode())
    if problems:
        report.log(f"the page names {counted(len(problems), 'problem')} with files of the set")
    return TargetSetReport(out / HTML, tuple(problems))


def open_originals(targets: TargetSet, source: Path | None, problems: list[str]) -> ShardSet | None:
    """The shard set that a target set was made from, if it is available.

    Raises:
        MismatchError: ``source`` is another one. ManifestError, DamageError: ``source`` is not an intact shard set.
    """
    path = source or (parent_set(targets.root) or targets.root) / SHARDS_FOLDER
    if source is None and file_size(path / MANIFEST) is None:
        return None
    try:
        originals = ShardSet.open(path)
        if others := differing_shards(targets, originals):
            raise MismatchError(
                f"shard {others[0]} of the source differs from the one that this target set was made from",
                where=path,
                fix="give the original source, or omit --source",
            )
    except BadInputError as error:
        if source is not None:
            raise
        problems.append(f"{path}: {error.what}")
        return None
    return originals


def differing_shards(targets: TargetSet, originals: ShardSet) -> list[str]:
    """The shards that a target set was made from, and that are not in a shard set."""
    there = {shard.name: shard.sha256 for shard in originals.shards}
    return sorted({unit["shard"] for unit in targets.stores.values() if there.get(unit["shard"]) != unit["source"]})


def profile_fidelity(
    targets: TargetSet, teacher: Teacher, count: int, *, report: Report, problems: list[str]
) -> FidelityProfile | None:
    """Run the teacher on ``count`` random stored views."""
    chosen = choose(targets, count, SEED)
    builder = ProfileBuilder(targets, WORST)
    report.log("running the teacher on stored views")
    report.total(sum(map(len, chosen.values())), "views")
    for (name, block), positions in chosen.items():
        try:
            builder.add(run_teacher_on(targets, teacher, name, block=block, positions=positions))
        except (DamageError, ImageError) as error:
            problems.append(f"{error.where or name}: {error.what}")
        report.advance(len(positions))
    return builder.profile()


def read_images(targets: TargetSet, report: Report, problems: list[str]) -> list[tuple[str, int, StoredImage]]:
    """Some stored images, each with its shard and its position in it."""
    report.log("reading some images")
    result = []
    for shard, position in choose_images(targets, IMAGES):
        views = [unit["view"] for unit in targets.stores.values() if unit["shard"] == shard]
        drawn = keyed_permutation(len(views), "report views", SEED, shard, position)[:VIEWS]
        try:
            stored = read_stored_image(targets, shard, position, [views[index] for index in drawn])
        except (DamageError, ImageError) as error:
            problems.append(f"{error.where or f'shard {shard}'}: {error.what}")
            continue
        result.append((shard, position, stored))
    return result


def choose_images(targets: TargetSet, count: int) -> list[tuple[str, int]]:
    """Shards and positions of ``count`` images (all, if there are fewer), a random one from each of ``count`` equal
    ranges."""
    samples = {unit["shard"]: unit["samples"] for unit in targets.stores.values()}
    shards = sorted(samples)
    ends = np.cumsum([samples[shard] for shard in shards])
    count = min(count, int(ends[-1]))
    borders = np.arange(count + 1) * int(ends[-1]) // count
    draws = keyed_uniforms(count, "report images", SEED)
    result = []
    for low, high, draw in zip(borders[:-1].tolist(), borders[1:].tolist(), draws.tolist(), strict=True):
        index = low + int(draw * (high - low))
        shard = int(np.searchsorted(ends, index, side="right"))
        result.append((shards[shard], index - (int(ends[shard - 1]) if shard else 0)))
    return result


def with_original(
    stored: StoredImage, originals: ShardSet | None, name: str, *, position: int, problems: list[str]
) -> tuple[StoredImage, str]:
    """The image with its original as the picture, if that can be read, and a caption of the picture."""
    kept = "original not available" if stored.picture is None else "reduced image"
    if originals is None:
        return stored, kept
    shard = next(shard for shard in originals.shards if shard.name == name)
    where = f"{shard.path}, key {stored.key}"
    try:
        (sample,) = originals.read(shard, position, position + 1)
        return replace(stored, picture=np.asarray(decode_rgb(sample.data, where=where))), "original"
    except (DamageError, ImageError) as error:
        problems.append(f"{error.where or where}: {error.what}")
        return stored, kept


def read_labels(targets: TargetSet, report: Report, problems: list[str]) -> np.ndarray:
    """Labels of all images, int32, without those of shards that cannot be read."""
    names = one_store_a_shard(targets)
    report.log("reading the labels")
    report.total(len(names), "shards")

    def read(name: str) -> np.ndarray | DamageError:
        try:
            return targets.reader(name).records().labels
        except DamageError as error:
            return error

    labels = [np.empty(0, dtype=np.int32)]
    for result in in_threads(read, ((name,) for name in names), READERS, most=2 * READERS):
        if isinstance(result, DamageError):
            problems.append(f"{result.where}: {result.what}")
        else:
            labels.append(result)
        report.advance()
    return np.concatenate(labels)


def rejected(originals: ShardSet) -> list[tuple[str, str]]:
    """Path and reason of every image of the source that could not be decoded."""
    units = ShardsArtifact.open(originals.root).units
    return [
        (reject["path"], reject["reason"])
        for _, unit in sorted(units.items())
        if "rejected" in unit
        for reject in unit["rejected"]
    ]


def commands(
    targets: TargetSet, root: Path, *, source: Path | None, live: int, weights: Path | None, inside: bool
) -> dict[str, str]:
    """The commands that add what is missing. ``inside``: the shard set is inside the target set."""
    shards = source or shards_next_to(targets, root) or "SHARDS"
    given = [*(["--source", source] if source else []), *(["--live", live] if live else [])]
    given += ["--teacher-weights", weights] if weights else []
    recoded = "recoded" in targets.artifact.identity
    made_from = ["--source", "TARGETS"] if recoded else [] if inside else ["--source", shards]
    return {
        "source": command("report", root, *given, "--source", shards),
        "live": command("report", root, *given, "--live", LIVE),
        "extend": command("recode", "TARGETS", root) if recoded else command("extract-targets", "SOURCE", root),
        "repair": command("verify", root, "--repair", *made_from),
    }


def shards_next_to(targets: TargetSet, root: Path) -> Path | None:
    """The shard set that a target set was made from, if it is in the same folder."""
    if not is_local(targets.root):
        return None
    with suppress(OSError, Cae2pipeError):
        for path in sorted(targets.root.parent.iterdir()):
            if is_artifact(path, "shards") and not differing_shards(targets, ShardSet.open(path)):
                return root.parent / path.name
    return None
