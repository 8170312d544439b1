import numpy as np
import pytest
import torch

from cae2pipe.errors import DamageError
from cae2pipe.targets.calibration import Calibration, calibrate, make_codec
from cae2pipe.targets.records import Records
from cae2pipe.targets.store import StoreReader
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.store_writing import StoreWriter, pack_block

TOKENS, DIM, SAMPLES = 5, 8, 130  # two full blocks and a short one


def unit(samples: int = SAMPLES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(samples, TOKENS, DIM, generator=generator), dim=-1)


@pytest.fixture(params=["klt", "int8", "fp16"])
def written(request, tmp_path):
    tokens = unit()
    calibration, _ = calibrate(tokens, request.param, 0.999, level=1)
    layout = StoreLayout(TOKENS, DIM, TOKENS - 1, True, make_codec(request.param, calibration))
    norms = np.linspace(1, 2, SAMPLES * TOKENS).reshape(SAMPLES, TOKENS).astype("<f2")
    attention = (np.arange(SAMPLES * (TOKENS - 1)) % 256).reshape(SAMPLES, -1).astype("u1")
    keys = [f"class+ü{i}" for i in range(SAMPLES)]
    jpegs = [bytes([i]) * (i + 1) for i in range(SAMPLES)]
    tar = tmp_path / "views.tar"
    tar.write_bytes(b"head" + b"".join(jpegs))
    offsets = 4 + np.cumsum([0, *(len(j) for j in jpegs[:-1])])
    import google_crc32c

    members = np.array([(o, len(j), google_crc32c.value(j)) for o, j in zip(offsets, jpegs, strict=True)])
    pooled = StoreLayout(1, 7, 0, False, make_codec("fp16", calibration), group="summary")
    summary = np.linspace(0, 1, SAMPLES * 7).reshape(SAMPLES, 1, 7).astype("<f2")
    writer = StoreWriter(tmp_path / "000000.zarr", layout, pooled)
    for low in range(0, SAMPLES, 64):
        where = slice(low, low + 64)
        arrays = layout.codec.encode(tokens[where])
        chunks = pack_block(layout, {**arrays, "norms": norms[where], "attention": attention[where]})
        chunks |= pack_block(pooled, {"tokens": summary[where], "norms": norms[where, :1]})
        writer.append(chunks, len(norms[where]))
    labels = np.zeros(SAMPLES, dtype=np.int32)
    writer.finish(Records(keys, labels, np.zeros((SAMPLES, 11)), members), {"view": 0})
    entry = {"tar": "views.tar", "zarr": "000000.zarr", "samples": SAMPLES}
    return tmp_path, entry, layout, tokens, norms, attention, keys, jpegs


def test_blocks_come_back_as_written(written):
    root, entry, layout, tokens, norms, attention, keys, jpegs = written
    reader = StoreReader(root, entry, layout)
    assert reader.blocks == 3
    for block in range(3):
        where = slice(block * 64, block * 64 + 64)
        got = reader.block(block)
        assert got.keys == keys[where]
        assert got.jpegs == jpegs[where]
        for name, array in layout.codec.encode(tokens[where]).items():
            np.testing.assert_array_equal(got.arrays[name], array)
        np.testing.assert_array_equal(got.arrays["norms"], norms[where])
        np.testing.assert_array_equal(got.arrays["attention"], attention[where])


def test_zarr_alone_reads_the_store(written):
    import zarr

    root, entry, layout, tokens, norms, *_ = written
    group = zarr.open_group(root / entry["zarr"], mode="r")
    for name, array in layout.codec.encode(tokens).items():
        stored = group["patches"][name][...]
        low_and_high = stored if name != "symbols" else stored[0] + stored[1].astype("<u2") * 256
        np.testing.assert_array_equal(low_and_high, array)
    np.testing.assert_array_equal(group["patches/norms"][...], norms)
    fields = {field["name"]: field for field in group["samples"].attrs["fields"]}
    start = fields["label"]["offset"]
    labels = np.ascontiguousarray(group["samples"][:, start : start + 4]).view(fields["label"]["type"])
    assert labels.ravel().tolist() == [0] * SAMPLES
    assert len(group.attrs["draw_columns"]) == 11


def test_each_group_has_its_codec_its_width_and_its_tokens(written):
    root, entry, *_ = written
    pooled = StoreLayout(1, 7, 0, False, make_codec("fp16", Calibration(torch.zeros(7))), group="summary")
    got = [StoreReader(root, entry, pooled).block(block).arrays["summary/tokens"] for block in range(3)]
    assert np.array_equal(np.concatenate(got).ravel(), np.linspace(0, 1, SAMPLES * 7).astype("<f2"))


def main_file(root, entry, layout):
    return next(path for path in (root / entry["zarr"] / "patches" / layout.codec.main).rglob("0") if path.is_file())


@pytest.mark.parametrize("damage", ["missing", "cut", "flip", "flip index"])
def test_damage_names_store_block_and_remedy(written, damage):
    root, entry, layout, *_ = written
    path = main_file(root, entry, layout)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-7])
    else:
        data[-9 if damage == "flip index" else 40] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        StoreReader(root, entry, layout).arrays(0)
    assert layout.codec.main in caught.value.where
    assert "block 0" in caught.value.where
    assert "--repair" in caught.value.fix


@pytest.mark.parametrize("at", [3, 90, 113, 120, -1])
def test_a_flipped_bit_in_the_records_is_found(written, at):
    root, entry, layout, *_ = written
    path = root / entry["zarr"] / "samples/c/0/0"
    data = bytearray(path.read_bytes())
    data[at] ^= 64
    path.write_bytes(data)
    with pytest.raises(DamageError, match="damaged"):
        StoreReader(root, entry, layout).records()


def test_a_changed_pixel_byte_names_the_key(written):
    root, entry, layout, *_ = written
    data = bytearray((root / "views.tar").read_bytes())
    data[4 + 1] ^= 1  # the first byte of the second JPEG
    (root / "views.tar").write_bytes(data)
    with pytest.raises(DamageError) as caught:
        StoreReader(root, entry, layout).jpegs(0)
    assert "key class+ü1" in caught.value.where


def test_a_cut_tar_is_found(written):
    root, entry, layout, *_ = written
    data = (root / "views.tar").read_bytes()
    (root / "views.tar").write_bytes(data[:-1])
    reader = StoreReader(root, entry, layout)
    assert len(reader.jpegs(1)) == 64
    with pytest.raises(DamageError, match="too early"):
        reader.jpegs(2)
