"""A target set for your own training loops: batches of views with the teacher's latents, on a device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.manifest_targets import layer_group
from cae2pipe.artifacts.storage import to_local_path
from cae2pipe.errors import SettingsError
from cae2pipe.loading.batches import Batch, without_padding
from cae2pipe.loading.device import on_device
from cae2pipe.loading.joining import join_sets, labels_of, of_teacher, prefix_of
from cae2pipe.loading.loader import block_refs, load_parts
from cae2pipe.loading.plan import OtherTeacher, Plan
from cae2pipe.loading.store_units import StoreUnits
from cae2pipe.loading.target_batch import TargetBatch, TargetBatchOfTeachers, TargetBatchWithGroups
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.groups import SUMMARY, layer_of
from cae2pipe.targets.paths import of_store
from cae2pipe.targets.store_layout import PATCHES, arrays_of, loaded_names
from cae2pipe.targets.target_set import TargetSet, reading_size

STREAMS = 16
"""Most streams of a rank, and with them most workers. Each has about ``WINDOW`` + 2 blocks in memory."""
WINDOW = 4
"""Blocks of 64 samples among which a stream shuffles."""


class TargetBatches(IterableDataset[TargetBatch]):
    """Shuffled batches of a target set, for any student and any training loop::

        batches = cae2pipe.TargetBatches("targets", batch_size=256, workers=8, device="cuda")
        for epoch in range(100):
            batches.set_epoch(epoch)
            for pixels, targets, *_ in batches:
                ...

    In an epoch every image comes exactly once, in one of its stored views; in as many epochs as it has views it shows
    each of them once. Order and views depend only on ``seed``, the epoch, ``batch_size`` and ``ranks``. Each ``iter()``
    starts an epoch: the one that ``set_epoch`` named, or the one after the last.

    It reads whole blocks, as ``pretrain`` does, in worker processes of its own. A script with ``workers`` above 0 needs
    ``if __name__ == "__main__":`` around what it does. ``torch.utils.data.DataLoader`` takes it with
    ``batch_size=None, num_workers=0``.

    Several sets, of other teachers over the same views, give ``TargetBatchOfTeachers``. ``teachers`` holds the sets by
    the labels of their teachers; ``targets`` is the first one. Views that only some of them hold are omitted, and a
    warning says how many stores remain.

    Args:
        targets: a target set, opened or its folder or URL; or a list of those of several teachers. One that is still
            being extracted gives what it held when it was opened. One by reference is given opened, with
            its ``pixels``, unless it is not the first.
        batch_size: views per batch of this rank. ``workers`` share the batch: powers of two serve up to 16 of them.
        layout: ``map``: the patches' latents as a feature map (B, D, rows, cols), without the class token; ``tokens``:
            all of them (B, T, D), the class token first, if the teacher has one.
        scaled: multiply each token by its stored length, which gives the teacher's own latents. Otherwise tokens have
            unit length, up to the codec's error.
        summary: give the teacher's summary too. layers: give the latents of these blocks of the teacher too. Then
            batches are ``TargetBatchWithGroups``. Of several teachers, those that have them give them.
        pixels: ``uint8``, or ``float``: from 0 to 1. Neither is normalised by a mean.
        image_size: side of the pixels, at most the views' own, which are then reduced. None: the ``image_size`` with
            which the set was opened, that of its views if none was given.
        views: use only the first so many stored views of each image. None: all.
        seed: of the order.
        drop_last: omit the last batch if it is smaller than the others. Otherwise it holds what remains of the
            epoch; no sample is repeated to fill it.
        workers: processes that read and decode JPEGs; 0: none, in this process; -1: one per core, shared among
            the ranks of a machine.
        device: where batches are, and latents are decoded: auto, cpu, cuda, cuda:1, ...
        rank: which share of every epoch this process takes, from 0. By default as torch.distributed or torchrun says.
        ranks: how many shares there are. All get equally many batches. If fewer samples than ranks remain for the last
            batch, these are omitted from the epoch.
        cache: a local folder that keeps what was read of a remote set.
        cache_gb: gigabytes that the cache may hold; what was read first stays.

    Raises:
        SettingsError: an argument is out of range, or a teacher is given twice. MismatchError: sets of several teachers
            have no views in common. ManifestError, DamageError: as ``TargetSet``; DamageError also while batches are
            read.
    """

    @checked
    def __init__(
        self,
        targets: TargetSet | str | Path | Sequence[TargetSet | str | Path],
        *,
        batch_size: int = 256,
        layout: Literal["map", "tokens"] = "map",
        scaled: bool = False,
        summary: bool = False,
        layers: Sequence[int] = (),
        pixels: Literal["uint8", "float"] = "uint8",
        image_size: int | None = None,
        views: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 0,
        device: str | torch.device = "cpu",
        rank: int | None = None,
        ranks: int | None = None,
        cache: str | Path | None = None,
        cache_gb: float = 100.0,
    ):
        at_least("batch_size", batch_size, 1)
        at_least("workers", workers, -1)
        at_least("seed", seed, 0)
        at_least("cache_gb", cache_gb, 0)
        joined = join_sets(opened(targets))
        if joined.note:
            warnings.warn(joined.note, stacklevel=3)
        self.targets = joined.main
        self.teachers = dict(zip(labels_of(joined.sets), joined.sets, strict=True))
        self.rank, self.ranks = this_rank(rank, ranks)
        self.device = pick_device(str(device), torchrun_rank())
        self.workers = worker_count(workers)
        self.layout, self.scaled, self.pixels = layout, scaled, pixels
        self.groups = [*([SUMMARY] if summary else []), *map(layer_group, layers)]
        self.epoch, self._first = 0, 0
        self._plan = batch_plan(
            joined.sets,
            batch_size,
            self.ranks,
            views=views,
            seed=seed,
            drop_last=drop_last,
            groups=self.groups,
            scaled=scaled,
            image_size=image_size,
            cache=BlockCache(to_local_path(cache), int(cache_gb * 1e9)) if cache else None,
        )

    def __repr__(self) -> str:
        share = f", rank {self.rank} of {self.ranks}" if self.ranks > 1 else ""
        return f"TargetBatches({len(self)} batches of {self.batch_size} per epoch{share}, from {self.targets})"

    def __len__(self) -> int:
        """Batches per epoch, of each rank."""
        return self._plan.steps

    @property
    def batch_size(self) -> int:
        """Views per batch of this rank."""
        return self._plan.batch // self.ranks

    @checked
    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Say which epoch the next ``iter()`` gives, and with which of its batches that begins: to resume.

        Raises:
            SettingsError: one of them is negative, or the epoch has fewer batches.
        """
        at_least("epoch", epoch, 0)
        at_least("batch", batch, 0)
        if batch > len(self):
            raise SettingsError(
                f"batch={batch}, and an epoch has {len(self)} batches",
                where="set_epoch",
                fix=f"use at most {len(self)}",
            )
        self.epoch, self._first = epoch, batch

    def __iter__(self) -> Iterator[TargetBatch]:
        if get_worker_info() is not None:
            raise SettingsError(
                "each worker of this DataLoader would give all batches",
                where="DataLoader(num_workers=...)",
                fix="DataLoader(..., batch_size=None, num_workers=0), and workers=... of TargetBatches",
            )
        epoch, first = self.epoch, self._first
        self.epoch, self._first = epoch + 1, 0
        return self._batches(epoch, first)

    def _batches(self, epoch: int, first: int) -> Iterator[TargetBatch]:
        if first >= len(self):
            return
        plan = replace(self._plan, epochs=epoch + 1)
        parts = load_parts(plan, epoch * plan.steps + first, self.workers, rank=self.rank, ranks=self.ranks)
        axes = plan.sample_axes()
        for batch in on_device(parts, axes, self.device):
            yield self._given(without_padding(batch, axes))

    def _given(self, batch: Batch) -> TargetBatch:
        # A loop may stand under autocast as a whole, which would round the latents.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            latents = {
                label: self._latents(targets, of_teacher(number, batch.arrays))
                for number, (label, targets) in enumerate(self.teachers.items())
            }
        pixels = batch.pixels.float().div_(255) if self.pixels == "float" else batch.pixels
        if self.workers and pixels is batch.pixels and pixels.device.type == "cpu":
            # In memory that holds a whole batch, and is used by workers again once no tensor of this process is in it.
            pixels = pixels.clone()
        labels, views = (torch.tensor(each, device=self.device) for each in (batch.labels, batch.views))
        given: TargetBatch | TargetBatchWithGroups | TargetBatchOfTeachers
        if len(latents) > 1:
            given = TargetBatchOfTeachers(
                pixels,
                {label: own[0] for label, own in latents.items()},
                batch.keys,
                labels,
                views,
                {label: own[1] for label, own in latents.items() if own[1] is not None},
                {label: own[2] for label, own in latents.items() if own[2]},
            )
        else:
            ((patches, summary, layers),) = latents.values()
            given = TargetBatch(pixels, patches, batch.keys, labels, views)
            if self.groups:
                given = TargetBatchWithGroups(*given, summary, layers)
        return cast(TargetBatch, given)  # the type of those who ask for no more, of one set

    def _latents(
        self, targets: TargetSet, arrays: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Patches, summary and layers of one teacher, in the form in which batches hold them."""
        groups = {group: self._tokens(targets, group, arrays) for group in (PATCHES, *groups_of(targets, self.groups))}
        summary, teacher = groups.pop(SUMMARY, None), targets.teacher
        if self.layout == "map":
            for group, tokens in groups.items():
                patches = tokens[:, int(teacher.class_token) :].transpose(1, 2)
                groups[group] = patches.unflatten(2, (teacher.rows, teacher.cols))
        layers = {layer: tokens for group, tokens in groups.items() if (layer := layer_of(group)) is not None}
        return groups[PATCHES], None if summary is None else summary[:, 0], layers

    def _tokens(self, targets: TargetSet, group: str, arrays: Mapping[str, Tensor]) -> Tensor:
        """The tokens (B, T, D) of a group."""
        own = arrays_of(group, arrays)
        tokens = targets.groups[group].layout.codec.decode(own)
        return tokens * own["norms"].float().unsqueeze(-1) if self.scaled else tokens


def opened(targets: TargetSet | str | Path | Sequence[TargetSet | str | Path]) -> list[TargetSet]:
    """The sets that an argument names. Raises SettingsError if it is an empty list."""
    several = targets if isinstance(targets, list | tuple) else [cast(TargetSet | str | Path, targets)]
    if not several:
        raise SettingsError("no target set is given", where="TargetBatches", fix="give at least one")
    return [each if isinstance(each, TargetSet) else TargetSet(each) for each in several]


def groups_of(targets: TargetSet, wanted: Sequence[str]) -> list[str]:
    """The groups of latents besides the patches that are read of a set."""
    return [group for group in wanted if group in targets.groups]


def batch_plan(
    sets: Sequence[TargetSet],
    batch_size: int,
    ranks: int,
    *,
    views: int | None,
    seed: int,
    drop_last: bool,
    groups: Sequence[str] = (),
    scaled: bool,
    image_size: int | None,
    cache: BlockCache | None,
) -> Plan:
    """What the loader must know of sets with the same stores. It draws no masks: a grid of one patch, always visible.

    Raises:
        SettingsError: the set has not so many views or pixels, not these groups of latents, or not enough images for a
            batch of all ranks.
    """
    targets, *others = sets
    if views is not None and not 1 <= views <= targets.views:
        raise SettingsError(
            f"views={views}, and the set has {targets.views} of each image",
            where=str(targets.root),
            fix=f"use 1 to {targets.views}, or None for all",
        )
    known = list(dict.fromkeys(group for each in sets for group in each.groups))
    if lacking := [group for group in groups if group not in known]:
        raise SettingsError(
            f"the set has no latents {lacking[0]!r}" if not others else f"no set has latents {lacking[0]!r}",
            where=", ".join(str(each.root) for each in sets),
            fix=f"there are {', '.join(known)}; make another with teacher.summary or teacher.layers",
        )
    most = views or targets.views
    names = [name for name in targets.stores if of_store(name).view < most]
    blocks = block_refs(targets, names)
    samples, batch = blocks.total, batch_size * ranks
    # A remainder that does not reach all ranks would give some of them one batch more than the others.
    drop = drop_last or samples % batch < ranks
    if samples < (batch if drop else ranks):
        raise SettingsError(
            f"the set has {counted(samples, 'image')}, too few for a batch of {batch_size} on each of "
            f"{counted(ranks, 'rank')}",
            where=str(targets.root),
            fix=f"use a batch_size of at most {samples // ranks}, or drop_last=False" if samples >= ranks else None,
        )
    layouts = [tuple(each.groups[group].layout for group in (PATCHES, *groups_of(each, groups))) for each in sets]
    arrays = [
        prefix_of(number) + name for number, own in enumerate(layouts) for name in loaded_names(own, norms=scaled)
    ]
    return Plan(
        root=targets.root,
        units=StoreUnits(targets, names),
        blocks=blocks,
        layout=targets.layout,
        size=targets.image_size if image_size is None else reading_size(targets, image_size),
        view_size=targets.view_size,
        seed=seed,
        epochs=1,
        batch=batch,
        streams=ranks * streams_of_a_rank(batch_size, len(blocks) // ranks),
        window=WINDOW,
        last_batch="drop" if drop else "pad",
        mask_strategy="random",
        grid=1,
        masked=0,
        repeat=1,
        drop_columns=0,
        arrays=tuple(arrays),
        more=layouts[0][1:],
        replayed=targets.replayed,
        cache=cache,
        others=tuple(
            OtherTeacher(prefix_of(number), other.root, StoreUnits(other, names), layouts[number])
            for number, other in enumerate(others, start=1)
        ),
        pixels=targets.pixels_root,
    )


def streams_of_a_rank(batch_size: int, blocks: int) -> int:
    """As many streams as divide the batch, up to ``STREAMS`` and to one for each block: where several streams share a
    block, each of them decompresses it."""
    most = max(1, min(STREAMS, blocks, batch_size))
    return next(streams for streams in range(most, 0, -1) if batch_size % streams == 0)


def this_rank(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, or as torch.distributed or torchrun has them.

    Raises:
        SettingsError: only one of them is given, or they contradict each other.
    """
    if rank is None and ranks is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        torchrun = torchrun_rank()
        return torchrun.rank, torchrun.ranks
    if rank is None or ranks is None or not 0 <= rank < ranks:
        raise SettingsError(
            f"rank={rank} and ranks={ranks} are no share of the batches",
            where="TargetBatches",
            fix="give both, with rank from 0 to ranks - 1, or neither",
        )
    return rank, ranks


def at_least(name: str, value: float, least: int) -> None:
    """Raise SettingsError where an argument is smaller."""
    if value < least:
        raise SettingsError(f"{name}={value}", where="TargetBatches", fix=f"use {least} or more")
