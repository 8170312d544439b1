import itertools

import pytest
import torch

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.errors import DamageError
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.loader import block_refs, load_batches
from cae2pipe.loading.plan import Plan
from cae2pipe.loading.planning import chosen_stores, make_plan
from cae2pipe.runtime.shared_memory import PREFETCH
from cae2pipe.targets.planes import merge_symbols
from cae2pipe.targets.target_set import TargetSet


@pytest.fixture(scope="module")
def targets(target_root):
    return TargetSet(target_root)


@pytest.fixture(scope="module")
def plan(targets, pretrain_settings) -> Plan:
    return make_plan(targets, sorted(targets.stores), pretrain_settings(), drop_columns=4)


def equal(one: Batch, other: Batch) -> bool:
    return (
        (one.epoch, one.step, one.keys) == (other.epoch, other.step, other.keys)
        and all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("pixels", "weights", "visible", "masked", "drop")
        )
        and one.arrays.keys() == other.arrays.keys()
        and all(torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    )


@pytest.fixture(scope="module")
def alone(plan) -> list[Batch]:
    return list(load_batches(plan, 0, 0))


def symbols_of(batch):
    return merge_symbols({name: array.numpy() for name, array in batch.arrays.items()})


def test_every_image_once_an_epoch_and_padding_without_weight(alone, plan, targets):
    assert plan.samples == targets.images == 150
    for epoch, group in itertools.groupby(alone, key=lambda batch: batch.epoch):
        steps = list(group)
        assert len(steps) == plan.steps == 5, epoch
        keys = [key for batch in steps for key in batch.keys]
        assert len({key for key in keys if key}) == 150
        assert len(keys) == 160
        weights = torch.cat([batch.weights for batch in steps])
        assert weights.tolist() == [float(bool(key)) for key in keys]


def test_pixels_and_latents_are_those_of_the_key(alone, targets):
    truth = {}
    for name in targets.stores:
        reader = targets.reader(name)
        for block in range(reader.blocks):
            got = reader.block(block)
            for row, key in enumerate(got.keys):
                truth.setdefault(key, []).append((targets.pixels(got, [row])[0], got.arrays["symbols"][:, row]))
    for row, key in enumerate(alone[0].keys):
        pixels = alone[0].pixels[row].permute(1, 2, 0).numpy()
        symbols = symbols_of(alone[0])[:, row]
        assert any((view == pixels).all() and (stored == symbols).all() for view, stored in truth[key])


def test_masks_follow_attention_however_many_workers(targets, pretrain_settings):
    settings = pretrain_settings(mask={"strategy": "attention"})
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=4)
    alone, shared = (list(load_batches(plan, 0, workers)) for workers in (0, 2))
    assert all(equal(one, two) for one, two in zip(alone, shared, strict=True))
    assert "attention" not in alone[0].arrays
    attention = {(view.view, view.key): view.attention for view in targets}
    seen, hidden = [], []
    for batch in alone:
        for row, (view, key) in enumerate(zip(batch.views, batch.keys, strict=True)):
            if key:
                seen.append(attention[view, key][batch.visible[row]].mean())
                hidden.append(attention[view, key][batch.masked[row]].mean())
    assert sum(seen) / len(seen) > sum(hidden) / len(hidden)


def test_only_the_views_asked_for(targets, pretrain_settings):
    settings = pretrain_settings(data={"views": 1})
    plan = make_plan(targets, chosen_stores(targets, settings), settings, drop_columns=4)
    assert plan.samples == 150
    assert {view for batch in load_batches(plan, 0, 0) for view in batch.views} <= {0, -1}


def test_two_epochs_show_two_views(alone, plan):
    shown = [
        {
            key: symbols_of(batch)[:, row].tobytes()
            for batch in alone
            if batch.epoch == epoch
            for row, key in enumerate(batch.keys)
            if key
        }
        for epoch in range(2)
    ]
    assert all(shown[0][key] != shown[1][key] for key in shown[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(alone, plan, workers):
    others = list(load_batches(plan, 0, workers))
    assert len(others) == len(alone)
    assert all(equal(one, other) for one, other in zip(alone, others, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_copied_batch_does_not_keep_the_memory_of_its_round(targets, pretrain_settings, workers):
    plan = make_plan(targets, sorted(targets.stores), pretrain_settings(data={"decode": "device"}), drop_columns=4)
    copies, places = [], set()
    for batch in load_batches(plan, 0, workers):
        places.add(batch.weights.untyped_storage().data_ptr())
        copies.append(batch.map(torch.clone))
        del batch
    assert len(copies) == 10
    assert len(places) <= PREFETCH + 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_give_the_global_batch(alone, plan, ranks):
    parts = [list(load_batches(plan, 0, 0, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, whole in enumerate(alone):
        assert whole.keys == [key for part in parts for key in part[step].keys]
        assert torch.equal(whole.pixels, torch.cat([part[step].pixels for part in parts]))
        assert torch.equal(whole.masked, torch.cat([part[step].masked for part in parts]))
        assert torch.equal(whole.drop, torch.cat([part[step].drop for part in parts]))


@pytest.mark.parametrize("start", [3, 5, 8])
def test_a_step_alone_says_what_comes_next(alone, plan, start):
    rest = list(load_batches(plan, start, 0))
    assert len(rest) == len(alone) - start
    assert all(equal(one, other) for one, other in zip(alone[start:], rest, strict=True))


def test_masks_have_the_asked_count_and_differ(alone, plan):
    assert alone[0].masked.shape == (32, 6)
    assert alone[0].visible.shape == (32, 10)
    both = torch.cat([alone[0].visible, alone[0].masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(16).expand(32, 16))
    assert len({tuple(row) for row in alone[0].masked.tolist()}) > 8


def test_a_run_reads_the_stores_it_began_with(targets):
    first = [name for name in targets.stores if name.startswith("v00")]
    assert all(ref.views == (0,) for ref in block_refs(targets, first))
    assert all(ref.views == (0, 1) for ref in block_refs(targets))


def test_damage_met_by_a_worker_process_arrives_whole(target_root, tmp_path, pretrain_settings):
    import shutil

    root = tmp_path / "set"
    shutil.copytree(target_root, root)
    targets = TargetSet(root)
    plan = make_plan(targets, sorted(targets.stores), pretrain_settings(), drop_columns=4)
    for unit in open_artifact(root).units.values():
        if "tar" in unit:
            data = bytearray((root / unit["tar"]).read_bytes())
            data[len(data) // 2] ^= 255
            (root / unit["tar"]).write_bytes(data)
    with pytest.raises(DamageError, match="checksum") as caught:
        list(load_batches(plan, 0, 2))
    assert "key class" in caught.value.where
    assert "cae2pipe verify" in caught.value.fix
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_odd_sizes_are_seen_exactly_once_for_any_number_of_ranks(targets, pretrain_settings, ranks):
    settings = pretrain_settings(data={"batch": 96, "streams": 48})
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=4)
    parts = [list(load_batches(plan, 0, 0, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {4}
    for epoch in range(2):
        keys = [key for part in parts for batch in part if batch.epoch == epoch for key in batch.keys if key]
        assert len(keys) == len(set(keys)) == 150
    for step in range(4):
        counted = sum(int(part[step].weights.sum()) for part in parts)
        assert {part[step].real for part in parts} == {counted}
