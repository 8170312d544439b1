"""A target set in other people's loops: what its batches hold, in which order, on how many workers and ranks."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import cae2pipe
from cae2pipe import TargetBatches, TargetSet
from cae2pipe.artifacts.storage import put_bytes, to_path
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.errors import DamageError, SettingsError
from cae2pipe.loading.order import BlockRef, rank_streams, stream_pieces
from cae2pipe.loading.target_batches import STREAMS, streams_of_a_rank
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.cache import folder_bytes
from tests.conftest import contents, edit_manifest

EXAMPLE = Path(__file__).parents[2] / "docs" / "distil_resnet.py"


@pytest.fixture(scope="module")
def targets(target_root) -> TargetSet:
    return TargetSet(target_root)


@pytest.fixture(scope="module")
def single(targets):
    """Every view by itself, by key and number."""
    return {(view.key, view.view): view for view in TargetSet(targets.root, "torch")}


def seen(batches) -> list[tuple[str, int]]:
    return [(key, view) for batch in batches for key, view in zip(batch.keys, batch.views.tolist(), strict=True)]


def same(one, other) -> bool:
    return one.keys == other.keys and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("pixels", "targets", "labels", "views")
    )


def check_content(batches, single, layout="tokens"):
    for batch in batches:
        for row, (key, view) in enumerate(zip(batch.keys, batch.views.tolist(), strict=True)):
            alone = single[key, view]
            assert torch.equal(batch.pixels[row].permute(1, 2, 0), alone.pixels)
            assert batch.labels[row] == alone.label
            given = batch.targets[row].flatten(1).T if layout == "map" else batch.targets[row]
            torch.testing.assert_close(given, alone.tokens[1:] if layout == "map" else alone.tokens, atol=1e-5, rtol=0)


def test_batches_hold_what_single_views_do(targets, single):
    batches = TargetBatches(targets, batch_size=40)
    (batch, *rest) = batches
    assert batch.pixels.shape == (40, 3, 32, 32)
    assert batch.pixels.dtype == torch.uint8
    assert batch.targets.shape == (40, 16, 4, 4)
    assert batch.targets.dtype == torch.float32
    assert not batch.targets.requires_grad
    check_content([batch, *rest], single, layout="map")
    check_content(TargetBatches(targets, batch_size=40, layout="tokens"), single)


@pytest.mark.parametrize(("codec", "pixels"), [("int8", "replayed"), ("fp16", "stored")])
def test_other_codecs_and_stored_views(tmp_path, photos, extract_settings, codec, pixels):
    settings = extract_settings(codec={"name": codec}, view={"pixels": pixels}, views=1)
    extract_targets(photos, tmp_path / "set", settings, report=Silent())
    single = {(view.key, view.view): view for view in TargetSet(tmp_path / "set", "torch")}
    batches = list(TargetBatches(tmp_path / "set", batch_size=64, layout="tokens"))
    assert len(seen(batches)) == 150
    check_content(batches, single)


def test_lengths_and_float_pixels(targets, single):
    batch = next(iter(TargetBatches(targets, batch_size=8, layout="tokens", scaled=True, pixels="float")))
    for row, (key, view) in enumerate(zip(batch.keys, batch.views.tolist(), strict=True)):
        alone = single[key, view]
        torch.testing.assert_close(batch.targets[row], alone.tokens * alone.norms[:, None], atol=1e-3, rtol=1e-5)
        assert torch.equal((batch.pixels[row].permute(1, 2, 0) * 255).round().byte(), alone.pixels)


def test_latents_keep_their_digits_under_autocast(targets):
    plain = next(iter(TargetBatches(targets, batch_size=32)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(next(iter(TargetBatches(targets, batch_size=32))), plain)


def test_every_image_once_per_epoch_and_every_view_in_as_many(targets):
    batches = TargetBatches(targets, batch_size=32)
    assert len(batches) == 5
    first, second = seen(batches), seen(batches)
    assert batches.epoch == 2
    for epoch in (first, second):
        assert Counter(key for key, _ in epoch) == Counter({view.key: 1 for view in targets})
    assert len({*first, *second}) == 300
    assert [key for key, _ in first] != [key for key, _ in second]


def test_the_last_batch_is_what_remains_or_left_out(targets):
    assert [len(batch.keys) for batch in TargetBatches(targets, batch_size=32)] == [32, 32, 32, 32, 22]
    dropped = TargetBatches(targets, batch_size=32, drop_last=True)
    assert len(dropped) == 4
    assert [len(batch.keys) for batch in dropped] == [32] * 4


def test_an_epoch_is_resumed_at_any_of_its_batches(targets):
    batches = TargetBatches(targets, batch_size=32)
    epochs = [list(batches) for _ in range(3)]
    again = TargetBatches(targets, batch_size=32)
    again.set_epoch(1, batch=3)
    rest = [*again, *again]
    assert len(rest) == 2 + 5
    assert all(same(one, other) for one, other in zip(rest, [*epochs[1][3:], *epochs[2]], strict=True))
    again.set_epoch(1, batch=5)
    assert list(again) == []
    other = next(iter(TargetBatches(targets, batch_size=32, seed=1)))
    assert not same(other, epochs[0][0])


def test_workers_change_nothing_and_a_loop_may_be_left(targets):
    alone = list(TargetBatches(targets, batch_size=32))
    shared = TargetBatches(targets, batch_size=32, workers=2)
    assert all(same(one, other) for one, other in zip(alone, shared, strict=True))
    shared.set_epoch(0)
    for batch in shared:
        assert same(batch, alone[0])
        break


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 32), (3, 16), (4, 37), (7, 21), (149, 1)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_an_epoch_in_equally_many_batches(targets, ranks, batch_size, drop_last):
    options = {"batch_size": batch_size, "ranks": ranks, "drop_last": drop_last, "pixels": "uint8"}
    all_ranks = [TargetBatches(targets, rank=rank, **options) for rank in range(ranks)]
    parts = [list(one) for one in all_ranks]
    assert {len(part) for part in parts} == {len(all_ranks[0])}
    keys = [key for part in parts for key, _ in seen(part)]
    assert len(keys) == len(set(keys))
    sizes = [[len(batch.keys) for batch in part] for part in parts]
    assert all(size == batch_size for part in sizes for size in part[:-1])
    assert all(0 < part[-1] <= batch_size for part in sizes)
    left = 150 % (batch_size * ranks)
    assert len(keys) == (150 - left if drop_last or left < ranks else 150)


@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 40))
def test_ranks_get_equally_many_batches_of_any_set(samples, ranks, batch_size):
    blocks = [BlockRef("s", block, min(64, samples - block * 64), (0,)) for block in range(-(-samples // 64))]
    own = streams_of_a_rank(batch_size, len(blocks) // ranks)
    assert 1 <= own <= STREAMS
    assert batch_size % own == 0
    streams, per_stream = own * ranks, batch_size // own
    pieces = stream_pieces(blocks, 0, 0, streams=streams, wanted=range(streams))
    lengths = [sum(piece.high - piece.low for piece in pieces[stream]) for stream in range(streams)]
    whole, left = divmod(samples, batch_size * ranks)
    for rank in range(ranks):
        mine = [lengths[stream] for stream in rank_streams(streams, ranks, rank)]
        assert all(length >= whole * per_stream for length in mine)
        last = sum(length - whole * per_stream for length in mine)
        assert last <= batch_size
        assert left < ranks or last > 0


def test_torchs_loader_takes_it_without_workers_of_its_own(targets):
    batches = TargetBatches(targets, batch_size=32)
    loader = DataLoader(batches, batch_size=None, num_workers=0)
    assert len(loader) == 5
    assert all(same(one, other) for one, other in zip(loader, TargetBatches(targets, batch_size=32), strict=True))
    assert batches.epoch == 1
    with pytest.raises(SettingsError, match="would give all batches"):
        next(iter(DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="forkserver")))


def test_only_the_views_asked_for(targets):
    assert {view for _, view in seen(TargetBatches(targets, views=1))} == {0}


def test_a_set_that_lacks_views(photos, tmp_path, extract_settings):
    """One whose second view has been made of a part of the images."""
    extract_targets(photos, tmp_path, extract_settings(views=1), report=Silent())
    extract_targets(photos, tmp_path, extract_settings(), report=Silent(), part=WorkShare(1, 3))
    units = TargetSet(tmp_path).stores.values()
    second = sum(unit["samples"] for unit in units if unit["view"] == 1)
    assert 0 < second < 150
    batches = TargetBatches(tmp_path, batch_size=64, workers=0)
    assert Counter(view for _ in range(2) for _, view in seen(batches)) == {0: 300 - second, 1: second}


def test_a_remote_set_is_read_through_the_cache(tmp_path, targets):
    remote = to_path("memory://loops/set")
    for name, data in contents(targets.root).items():
        put_bytes(remote / name, data)
    local = list(TargetBatches(targets, batch_size=64))
    cached = TargetBatches(str(remote), batch_size=64, cache=tmp_path / "cache", cache_gb=0.1)
    assert all(same(one, other) for one, other in zip(local, cached, strict=True))
    assert folder_bytes(tmp_path / "cache") > 100_000


def test_ranks_are_torchruns_unless_given(targets, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert "rank 1 of 2" in repr(TargetBatches(targets))
    assert TargetBatches(targets, rank=0, ranks=1).ranks == 1


def test_damage_is_named(tmp_path, target_root):
    root = shutil.copytree(target_root, tmp_path / "set")
    file = next(path for path in sorted(root.glob("latents/v00/*.zarr/patches/symbols/c/**/*")) if path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match="checksum"):
        list(TargetBatches(root, views=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": -2}, "workers=-2"),
        ({"seed": -1}, "seed=-1"),
        ({"views": 3}, "views=3, and the set has 2"),
        ({"layout": "maps"}, "layout='maps' is not 'map' or 'tokens'"),
        ({"pixels": "float32"}, "pixels='float32' is not 'uint8' or 'float'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"rank": 1}, "rank=1 and ranks=None"),
        ({"rank": 2, "ranks": 2}, "rank=2 and ranks=2"),
        ({"batch_size": 151, "drop_last": True}, "too few for a batch of 151"),
        ({"batch_size": 1, "rank": 0, "ranks": 151}, "too few for a batch of 1 on each of 151 ranks"),
    ],
)
def test_mistakes_are_told_in_words(targets, options, words):
    with pytest.raises(SettingsError, match=words):
        cae2pipe.TargetBatches(targets, **options)


def test_negative_epochs_are_refused(targets):
    with pytest.raises(SettingsError, match="epoch=-1"):
        TargetBatches(targets).set_epoch(-1)
    with pytest.raises(SettingsError, match="batch=-1"):
        TargetBatches(targets).set_epoch(0, batch=-1)


def test_the_example_learns(tmp_path, monkeypatch, capsys, target_root):
    out = tmp_path / "distilled.pt"
    options = ["--backbone", "resnet10t", "--epochs", "4", "--batch-size", "32", "--lr", "0.004", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["distil_resnet.py", str(target_root), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert "conv1.0.weight" in torch.load(out, weights_only=True)


def test_the_example_is_short():
    code = [line for line in EXAMPLE.read_text().split("def main")[1].splitlines() if line.strip()]
    assert len(code) <= 40


def test_a_loop_that_is_open_when_the_script_ends_leaves_nothing_to_warn_of(target_root):
    code = (
        "import cae2pipe\nif __name__ == '__main__':\n"
        f"    batches = iter(cae2pipe.TargetBatches({str(target_root)!r}, batch_size=32, workers=2))\n"
        "    print(len(next(batches).keys))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("32\n", "")


def test_what_is_given_is_not_a_workers_memory(target_root):
    """That holds the latents too, and is used again once no tensor is in it."""
    batches = TargetBatches(target_root, batch_size=12, workers=1)
    given = [batch.pixels for batch in batches]
    assert len(given) == 13
    assert all(pixels.untyped_storage().nbytes() == pixels.numel() for pixels in given)


@pytest.fixture(scope="module")
def teachers(wide_root, summary_root) -> dict[str, TargetSet]:
    """Sets of two teachers over the same views; only the second one has a summary and layers."""
    return {"wide": TargetSet(wide_root, "torch"), "tiny": TargetSet(summary_root, "torch")}


def equal_all(one, other) -> bool:
    """Whether two batches of several teachers are equal to the bit."""
    nested = all(
        torch.equal(tensor, getattr(other, field)[label])
        for field in ("targets", "summary")
        for label, tensor in getattr(one, field).items()
    )
    layers = all(torch.equal(one.layers["tiny"][number], other.layers["tiny"][number]) for number in one.layers["tiny"])
    same_rest = torch.equal(one.pixels, other.pixels) and torch.equal(one.views, other.views)
    return one.keys == other.keys and nested and layers and same_rest


@pytest.mark.parametrize(("layout", "scaled"), [("tokens", True), ("map", False)])
def test_batches_of_several_teachers_hold_what_each_set_does(teachers, layout, scaled):
    single = {label: {(view.key, view.view): view for view in own} for label, own in teachers.items()}
    batches = TargetBatches(
        list(teachers.values()), batch_size=40, layout=layout, scaled=scaled, summary=True, layers=[1]
    )
    assert [(label, own.root) for label, own in batches.teachers.items()] == [(k, v.root) for k, v in teachers.items()]
    assert len(seen(batches)) == 150
    for batch in batches:
        assert batch.targets.keys() == teachers.keys()
        assert (batch.summary.keys(), batch.layers.keys(), batch.layers["tiny"].keys()) == ({"tiny"}, {"tiny"}, {1})
        for row, place in enumerate(zip(batch.keys, batch.views.tolist(), strict=True)):
            for label, tensor in batch.targets.items():
                alone = single[label][place]
                assert torch.equal(batch.pixels[row].permute(1, 2, 0), alone.pixels)
                wanted = alone.tokens * alone.norms[:, None] if scaled else alone.tokens
                given = tensor[row]
                if layout == "map":
                    given, wanted = given.flatten(1).T, wanted[int(teachers[label].teacher.class_token) :]
                torch.testing.assert_close(given, wanted, atol=1e-3, rtol=1e-5)
            wanted = alone.summary * (float(alone.summary_norm) if scaled else 1)
            torch.testing.assert_close(batch.summary["tiny"][row], wanted, atol=1e-3, rtol=1e-4)


def test_several_teachers_come_in_the_order_of_one_and_are_resumed(teachers, wide_root):
    roots = [own.root for own in teachers.values()]

    def made(**over) -> TargetBatches:
        return TargetBatches(roots, batch_size=32, summary=True, layers=[1], **over)

    batches = made()
    epochs = [list(batches) for _ in range(2)]
    again = made(workers=2)
    again.set_epoch(1, batch=3)
    assert all(equal_all(one, other) for one, other in zip(again, epochs[1][3:], strict=True))
    assert seen(epochs[0]) == seen(TargetBatches(wide_root, batch_size=32))
    shares = [list(TargetBatches(roots, batch_size=16, rank=rank, ranks=2)) for rank in range(2)]
    assert len({key for share in shares for key, _ in seen(share)}) == 150


def test_several_teachers_that_do_not_fit_are_refused_or_narrowed(teachers, tmp_path, target_root, int8_root):
    roots = [own.root for own in teachers.values()]
    with pytest.raises(SettingsError, match="a teacher twice"):
        TargetBatches([target_root, int8_root])
    with pytest.raises(SettingsError, match="no set has latents 'layer-09'"):
        TargetBatches(roots, layers=[9])
    with pytest.raises(SettingsError, match="no target set is given"):
        TargetBatches([])
    other = Path(shutil.copytree(roots[1], tmp_path / "other"))
    units = json.loads((other / "manifest.json").read_text())["units"]
    edit_manifest(other, units={name: unit for name, unit in units.items() if not name.startswith("v01")})
    with pytest.warns(UserWarning, match=r"the 3 stores that all target sets have \(stores: wide 6, tiny 3\)"):
        batches = TargetBatches([roots[0], other])
    assert {view for _ in range(2) for _, view in seen(batches)} == {0}
