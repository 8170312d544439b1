"""Symbols as bytes: nothing is clipped, whatever a component did in the calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.targets.calibration import Calibration, make_codec
from cae2pipe.targets.chunks import ChunkError, encode_chunk
from cae2pipe.targets.codecs import TokenKltCodec, as_tensors
from cae2pipe.targets.planes import SPARE_BYTES, SPARES, join_planes, merge_symbols, same_width, split_symbols
from cae2pipe.targets.records import Records
from cae2pipe.targets.store import StoreReader, unpack_array
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.store_writing import StoreWriter, pack_block


def layout(tokens: int, dim: int, wide: int) -> StoreLayout:
    """A layout whose codec has so many wide components."""
    spread = torch.linspace(2, 1, tokens * dim).reshape(tokens, dim)
    calibration = Calibration(
        torch.zeros(dim), torch.eye(dim), step=1.0, token_basis=torch.eye(tokens), spread=1e-3 * spread
    )
    codec = make_codec("klt", calibration)
    codec.wide = wide
    return StoreLayout(tokens, dim, tokens, False, codec)


def stored(folder, own: StoreLayout, symbols: np.ndarray) -> StoreReader:
    """A store of these symbols, written as extraction writes it."""
    count = symbols.shape[1]
    writer = StoreWriter(folder / "s.zarr", own)
    for low in range(0, count, 64):
        part = symbols[:, low : low + 64]
        norms = np.ones((part.shape[1], own.tokens))
        writer.append(pack_block(own, {"symbols": part, "norms": norms}), part.shape[1])
    members = np.zeros((count, 3), dtype=np.int64)
    keys = [str(number) for number in range(count)]
    writer.finish(Records(keys, np.zeros(count, dtype=np.int32), np.zeros((count, 11)), members), {})
    return StoreReader(folder, {"tar": "none", "zarr": "s.zarr", "samples": count}, own)


@given(
    count=st.sampled_from([1, 63, 64, 65, 130]),
    tokens=st.integers(1, 3),
    dim=st.sampled_from([1, 5, 64, 129, 257]),
    data=st.data(),
)
def test_every_symbol_comes_back_by_both_ways(tmp_path_factory, count, tokens, dim, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    symbols = rng.integers(0, data.draw(st.sampled_from([1, 200, 256])), (dim, count, tokens)).astype("<u2")
    for _ in range(data.draw(st.integers(0, 3))):
        # Outliers anywhere, of any size, up to a whole component or a whole sample of them.
        where = tuple(data.draw(st.one_of(st.just(slice(None)), st.integers(0, side - 1))) for side in symbols.shape)
        symbols[where] = data.draw(st.sampled_from([255, 256, 257, 32767, 32768, 65535]))
    own = layout(tokens, dim, data.draw(st.integers(0, dim)))
    reader = stored(tmp_path_factory.mktemp("planes"), own, symbols)
    for block in range(reader.blocks):
        where = slice(64 * block, 64 * block + 64)
        assert np.array_equal(reader.arrays(block)["symbols"], symbols[:, where])
        loaded = reader.loaded(block, own.loaded_latents())
        assert set(loaded) == set(own.loaded_latents())
        for name, array in own.loaded().items():
            if name in loaded and name not in SPARES:
                assert loaded[name].shape == array.shape(symbols[:, where].shape[1])
        joined = join_planes(as_tensors({name: np.ascontiguousarray(each) for name, each in loaded.items()}))
        assert np.array_equal(joined.numpy().view("<u2"), symbols[:, where])
        assert np.array_equal(merge_symbols(loaded), symbols[:, where])


def test_the_codec_decodes_planes_as_it_decodes_symbols(tmp_path):
    own = layout(3, 70, 2)
    assert isinstance(own.codec, TokenKltCodec)
    symbols = np.random.default_rng(0).integers(0, 300, (70, 20, 3)).astype("<u2")
    loaded = stored(tmp_path, own, symbols).loaded(0, own.loaded_latents())
    assert loaded[SPARE_BYTES].any()
    planes = as_tensors({name: np.ascontiguousarray(each) for name, each in loaded.items()})
    assert torch.equal(own.codec.decode(planes), own.codec.decode(as_tensors({"symbols": symbols})))


def test_chunks_of_zeros_take_no_bytes(tmp_path):
    own = layout(2, 500, 1)
    symbols = np.zeros((500, 64, 2), dtype="<u2")
    symbols[:125] = 200
    symbols[0] = 300
    chunks = pack_block(own, {"symbols": symbols, "norms": np.ones((64, 2))})["patches/symbols"]
    assert [bool(chunk) for chunk in chunks] == [True, False, False, False, True, False, False, False]


def test_parts_with_more_single_bytes_widen_the_others():
    narrow, wide = torch.ones(2, 4), torch.ones(3, 8)
    both = torch.cat(same_width([narrow, wide]))
    assert both.shape == (5, 8)
    assert both.sum() == 2 * 4 + 3 * 8


@pytest.mark.parametrize("value", [0, 255, 256, 65535])
def test_planes_are_low_and_high_bytes(value):
    planes = split_symbols(np.full((1, 1, 1), value, dtype="<u2"))
    assert planes.dtype == np.uint8
    assert planes.ravel().tolist() == [value % 256, value // 256]


@pytest.mark.parametrize("where", [(128, 0, 0), (0, 10, 1)])
def test_padding_that_is_not_zero_is_damage(tmp_path, where):
    """Of components that there are not, or of samples: such a chunk fits its checksum, and no array that it is for."""
    own = layout(2, 129, 1)
    symbols = np.full((129, 5, 2), 300, dtype="<u2")
    chunks = pack_block(own, {"symbols": symbols, "norms": np.ones((5, 2))})["patches/symbols"]
    last = own.stored("symbols").chunk[1:]
    part = np.zeros(last, dtype="|u1")
    part[where if where[0] < last[0] else (last[0] - 1, *where[1:])] = 1
    chunks[-1] = encode_chunk(part, 1)
    with pytest.raises(ChunkError, match="padding"):
        unpack_array(own, "symbols", chunks, 5)
