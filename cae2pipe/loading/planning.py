"""The loading plan of a run: the stores of a target set that it trains on, and its settings for batches."""

from __future__ import annotations

from collections.abc import Sequence

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.fresh import fresh_views
from cae2pipe.loading.joining import prefix_of
from cae2pipe.loading.loader import block_refs
from cae2pipe.loading.plan import OtherTeacher, Plan
from cae2pipe.loading.store_units import StoreUnits
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.groups import SUMMARY
from cae2pipe.targets.paths import of_store
from cae2pipe.targets.store_layout import StoreLayout, loaded_names
from cae2pipe.targets.target_set import TargetSet


def chosen_stores(targets: TargetSet, settings: PretrainSettings) -> list[str]:
    """Names of the stores to train on: all, or those of the first views."""
    views = settings.data.views or targets.views
    return sorted(name for name in targets.stores if of_store(name).view < views)


def make_plan(
    targets: TargetSet,
    stores: list[str],
    settings: PretrainSettings,
    *,
    drop_columns: int,
    others: Sequence[TargetSet] = (),
) -> Plan:
    """The loader's plan, from the set and the settings. ``others``: sets of further teachers with the same stores.

    Raises:
        MismatchError: the originals of fresh views are not those of the set. ManifestError: there are none.
        SettingsError: nobody said where the pixels of a set by reference lie.
    """
    speed = settings.speed
    latents = settings.targets == "cached" and settings.loss.target != "pixels"
    layouts = read_layouts(targets, settings) if latents else (targets.layout,)
    norms = settings.loss.kind != "cosine"
    further = tuple(
        OtherTeacher(prefix_of(number), other.root, StoreUnits(other, stores), read_layouts(other, settings))
        for number, other in enumerate(others if latents else (), start=1)
    )
    arrays = loaded_names(layouts, norms=norms) if latents else ()
    for other in further:
        arrays += tuple(other.prefix + name for name in loaded_names(other.layouts, norms=norms))
    return Plan(
        root=targets.root,
        units=StoreUnits(targets, stores),
        blocks=block_refs(targets, stores),
        layout=targets.layout,
        size=settings.model.image_size,
        view_size=targets.view_size,
        seed=settings.seed,
        epochs=settings.epochs,
        batch=settings.loaded_batch,
        streams=settings.data.streams,
        window=settings.data.window,
        last_batch=settings.data.last_batch,
        mask_strategy=settings.mask.strategy,
        grid=settings.model.grid,
        masked=settings.masked_patches,
        repeat=settings.mask.repeat,
        drop_columns=drop_columns,
        arrays=arrays,
        more=layouts[1:],
        guides=("attention",) if settings.mask.strategy == "attention" else (),
        decode=settings.data.decode == "workers",
        replayed=targets.replayed,
        fresh=fresh_views(targets, settings) if settings.views == "fresh" else None,
        cache=BlockCache(speed.cache, int(speed.cache_gb * 1e9)) if speed.cache else None,
        others=further,
        pixels=None if settings.views == "fresh" else targets.pixels_root,
    )


def read_layouts(targets: TargetSet, settings: PretrainSettings) -> tuple[StoreLayout, ...]:
    """The groups of latents of a set that are targets, ``patches`` first."""
    teacher = targets.teacher
    if settings.loss.aligns_summary(teacher.class_token, stored=teacher.summary is not None):
        return targets.layout, targets.groups[SUMMARY].layout
    return (targets.layout,)
