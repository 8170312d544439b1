"""Codecs: error bounds, layouts, exact inverses of the lossless parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.errors import TeacherError
from cae2pipe.targets.calibration import (
    Calibration,
    calibrate,
    find_step,
    make_codec,
    principal_axes,
    summarise,
    token_axes,
    token_cosines,
)
from cae2pipe.targets.chunks import SYMBOL_SHUFFLES, encode_chunk
from cae2pipe.targets.codecs import (
    Fp16Codec,
    Int8Codec,
    KltCodec,
    TokenKltCodec,
    as_tensors,
    round_biased,
    rounding_bias,
    unit_tokens,
    unzigzag,
    unzigzag16,
    zigzag,
)
from cae2pipe.targets.store_writing import pack_symbols, packed_bytes
from cae2pipe.targets.stored_calibration import decode_calibration, write_calibration


def correlated_tokens(n: int, tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Unit tokens with a mean and a decaying spectrum, like a teacher's."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.linspace(0, 4, dim).neg().exp()
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    raw = torch.randn(n, tokens, dim, generator=generator) * spectrum @ mix.T + 0.5 * mix[0]
    return unit_tokens(raw)[0]


def images(n: int, tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Unit tokens with similar neighbours, as in an image."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.linspace(0, 4, dim).neg().exp()
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    walk = torch.randn(n, tokens, dim, generator=generator)
    for token in range(1, tokens):
        walk[:, token] = 0.8 * walk[:, token - 1] + 0.6 * walk[:, token]
    return unit_tokens(walk * spectrum @ mix.T + 0.5 * mix[0])[0]


def fitted(unit: torch.Tensor, step: float) -> TokenKltCodec:
    mean, basis = principal_axes(unit)
    token_basis, spread = token_axes(unit, mean, basis)
    return TokenKltCodec(mean.float(), basis.float(), token_basis.float(), spread=spread.float(), step=step)


def size(codec, unit: torch.Tensor) -> int:
    """Bytes of a block's chunks."""
    return packed_bytes({"symbols": pack_symbols(codec.encode(unit)["symbols"], codec.level)})


@settings(deadline=None)
@given(st.lists(st.integers(-(2**30), 2**30 - 1), min_size=1, max_size=50))
def test_zigzag_round_trips_and_keeps_small_values_small(values):
    tensor = torch.tensor(values, dtype=torch.int32)
    symbols = zigzag(tensor)
    assert torch.equal(unzigzag(symbols), tensor)
    assert symbols.tolist() == [2 * v if v >= 0 else -2 * v - 1 for v in values]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(2, 40), st.floats(1e-3, 0.5), st.integers(0, 1000))
def test_klt_error_is_at_most_half_a_step_in_every_component(n, tokens, dim, step, seed):
    unit = correlated_tokens(n, tokens, dim, seed)
    mean, basis = principal_axes(unit)
    codec = KltCodec(mean.float(), basis.float(), step)
    arrays = codec.encode(unit)
    assert arrays["symbols"].shape == (dim, n, tokens)
    assert arrays["symbols"].dtype == np.uint16
    decoded = codec.decode(as_tensors(arrays))
    assert decoded.shape == unit.shape
    error = (decoded - unit).reshape(-1, dim).double() @ basis
    assert float(error.abs().max()) <= step / 2 * 1.001 + 1e-5


@settings(deadline=None)
@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=50))
def test_zigzag_of_16_bits_is_undone_in_16_bits(values):
    tensor = torch.tensor(values, dtype=torch.int32)
    assert unzigzag16(zigzag(tensor).to(torch.uint16).view(torch.int16)).tolist() == values


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(2, 40), st.floats(1e-3, 0.5), st.integers(0, 1000))
def test_klt_of_images_errs_by_half_a_step_and_the_bias_at_most(n, tokens, dim, step, seed):
    unit = images(n, tokens, dim, seed)
    codec = fitted(unit, step)
    arrays = codec.encode(unit)
    assert arrays["symbols"].shape == (dim, n, tokens)
    assert arrays["symbols"].dtype == np.uint16
    decoded = codec.decode(as_tensors(arrays))
    assert decoded.shape == unit.shape
    error = codec.token_basis.double().T @ (decoded - unit).double() @ codec.basis.double()
    assert bool((error.abs() <= step * (0.5 + rounding_bias(codec.spread, step)) * 1.001 + 1e-5).all())


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(1e-6, 10), st.floats(1e-3, 1))
def test_rounding_goes_towards_zero_and_more_so_the_rarer_a_value_is(value, spread, step):
    bias = rounding_bias(torch.tensor([spread, 2 * spread], dtype=torch.float64), step)
    assert 0 <= bias[1] <= bias[0] < 0.93
    rounded = round_biased(torch.tensor([value], dtype=torch.float64), bias)
    assert bool((rounded == rounded.round()).all())
    assert bool((rounded.abs() <= abs(value) + 0.5).all())
    assert bool((rounded * value >= 0).all())
    assert bool(((rounded - value).abs() <= 0.5 + bias + 1e-9).all())


@pytest.mark.parametrize("make", [lambda step: KltCodec(torch.zeros(4), torch.eye(4), step), None])
def test_klt_overflow_is_an_error_and_never_a_wrap(make):
    make = make or (
        lambda step: TokenKltCodec(torch.zeros(4), torch.eye(4), torch.eye(1), spread=torch.ones(1, 4), step=step)
    )
    with pytest.raises(TeacherError, match="65535"):
        make(1e-5).encode(torch.ones(1, 1, 4))
    # A symbol of all 16 bits still comes back.
    assert torch.allclose(
        make(1 / 32760).decode(as_tensors(make(1 / 32760).encode(-torch.ones(1, 1, 4)))), -torch.ones(4)
    )
    # The largest symbol that fits still comes back.
    edge = KltCodec(torch.zeros(1), torch.eye(1), 1 / 32767)
    decoded = edge.decode(as_tensors(edge.encode(torch.tensor([[[1.0], [-1.0]]]))))
    assert torch.allclose(decoded.flatten(), torch.tensor([1.0, -1.0]))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 30), st.integers(0, 1000))
def test_int8_error_is_at_most_half_a_scale(n, tokens, dim, seed):
    unit = correlated_tokens(n, tokens, max(dim, 2), seed)
    arrays = Int8Codec().encode(unit)
    decoded = Int8Codec().decode(as_tensors(arrays))
    scale = torch.from_numpy(arrays["scales"].astype(np.float32)).unsqueeze(-1)
    assert bool(((decoded - unit).abs() <= scale / 2 * 1.001 + 1e-7).all())
    assert int(np.abs(arrays["tokens"].astype(int)).max()) <= 127


def test_int8_survives_a_zero_token():
    decoded = Int8Codec().decode(as_tensors(Int8Codec().encode(torch.zeros(1, 2, 3))))
    assert torch.equal(decoded, torch.zeros(1, 2, 3))


def test_fp16_is_the_rounded_token():
    unit = correlated_tokens(2, 3, 8)
    arrays = Fp16Codec().encode(unit)
    assert torch.equal(Fp16Codec().decode(as_tensors(arrays)), unit.half().float())


def test_norms_and_unit_tokens_give_the_tokens_back():
    tokens = torch.randn(3, 5, 16) * 20
    unit, norms = unit_tokens(tokens)
    assert torch.allclose(unit * norms.unsqueeze(-1), tokens, atol=1e-5)
    with pytest.raises(TeacherError, match="norm"):
        unit_tokens(torch.full((1, 1, 4), 1e5))


@pytest.mark.parametrize("make", [correlated_tokens, images])
@pytest.mark.parametrize("fidelity", [0.9, 0.97, 0.99, 0.999, 0.9999])
def test_calibration_reaches_the_fidelity_on_other_samples_and_not_by_far(fidelity, make):
    unit = make(320, 20, 48)
    calibration, reached = calibrate(unit[:240], "klt", fidelity, level=1)
    unit = unit[180:]
    codec = make_codec("klt", calibration)
    decoded = codec.decode(as_tensors(codec.encode(unit[60:])))
    fresh = summarise(*token_cosines(unit[60:], decoded, calibration.mean))
    assert reached.mean >= fidelity
    assert fresh.mean >= fidelity
    assert 1 - fresh.mean > 0.85 * (1 - fidelity), "the step is needlessly small: bytes are wasted"
    assert fresh.p1 <= fresh.mean
    assert fresh.centred_mean < fresh.mean


def test_calibration_does_not_depend_on_threads():
    unit = correlated_tokens(40, 20, 48)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(calibrate(unit, "klt", 0.999, level=1)[0])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].basis, results[1].basis)
    assert torch.equal(results[0].token_basis, results[1].token_basis)
    assert torch.equal(results[0].spread, results[1].spread)
    assert results[0].step == results[1].step


def test_signs_of_principal_axes_follow_the_rule():
    _, basis = principal_axes(correlated_tokens(20, 10, 12))
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-10)


def test_a_lower_fidelity_gives_a_larger_step():
    unit = correlated_tokens(20, 10, 12)
    mean, basis = principal_axes(unit)
    token_basis, spread = token_axes(unit, mean, basis)
    for along_tokens in ({}, {"token_basis": token_basis, "spread": spread}):
        steps = [
            find_step(unit, mean, basis, fidelity=fidelity, **along_tokens)
            for fidelity in (0.9999, 0.999, 0.99, 0.97, 0.9)
        ]
        assert steps == sorted(steps)


def test_a_lower_fidelity_gives_fewer_bytes_and_a_larger_distance():
    unit = images(80, 20, 48)
    sizes_and_cosines = []
    for fidelity in (0.9999, 0.999, 0.99, 0.97, 0.9):
        calibration, reached = calibrate(unit, "klt", fidelity, level=1)
        sizes_and_cosines.append((size(make_codec("klt", calibration), unit[:64]), reached.mean))
    assert sizes_and_cosines == sorted(sizes_and_cosines, reverse=True)


@pytest.mark.parametrize(("fidelity", "share"), [(0.999, 0.95), (0.97, 0.85), (0.9, 0.75)])
def test_rotating_the_tokens_saves_bytes(fidelity, share):
    unit = images(120, 20, 48)
    sizes = [
        size(make_codec("klt", calibrate(unit, "klt", fidelity, level=1, rotate_tokens=rotated)[0]), unit[:64])
        for rotated in (True, False)
    ]
    assert sizes[0] <= share * sizes[1]


def test_coding_does_not_depend_on_what_else_is_in_the_block_nor_on_where_constants_lie():
    unit = images(20, 10, 12)
    calibration, _ = calibrate(unit, "klt", 0.97, level=1)
    codec, again = make_codec("klt", calibration), make_codec("klt", calibration)
    again.place(torch.device("cpu"))
    symbols = codec.encode(unit)["symbols"]
    assert np.array_equal(symbols, again.encode(unit)["symbols"])
    assert np.array_equal(symbols[:, 3:5], codec.encode(unit[3:5])["symbols"])
    decoded = codec.decode(as_tensors({"symbols": symbols}))
    torch.testing.assert_close(codec.decode(as_tensors({"symbols": symbols[:, 3:5]})), decoded[3:5])


def stored(folder: Path, tokens: int, dim: int) -> Calibration:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return decode_calibration(files, tokens, dim)


@pytest.mark.parametrize("rotated", [True, False])
def test_calibrations_of_both_forms_are_kept(rotated, tmp_path):
    unit = images(20, 10, 12)
    calibration, _ = calibrate(unit, "klt", 0.97, level=1, rotate_tokens=rotated)
    write_calibration(tmp_path / "codec.zarr", {"patches": calibration})
    again = stored(tmp_path / "codec.zarr" / "patches", 10, 12)
    assert (tmp_path / "codec.zarr" / "patches" / "token_basis").exists() == rotated
    codecs = [make_codec("klt", each) for each in (calibration, again)]
    assert type(codecs[0]) is type(codecs[1]) is (TokenKltCodec if rotated else KltCodec)
    assert np.array_equal(*(codec.encode(unit)["symbols"] for codec in codecs))


def test_each_chunk_has_the_shuffle_that_takes_fewer_bytes():
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 256, (256, 64, 20)).astype("<u2")
    symbols[128:] = rng.random((128, 64, 20)) < 0.02
    filled, sparse = pack_symbols(symbols, 1)[:2]
    for chunk, part, shuffle in ((filled, symbols[:128], "noshuffle"), (sparse, symbols[128:], "bitshuffle")):
        sizes = {name: len(encode_chunk(part.astype("|u1"), 1, name)) for name in SYMBOL_SHUFFLES}
        assert len(chunk) == min(sizes.values()) == sizes[shuffle]
    assert len({*map(len, (filled, sparse))}) == 2


def test_one_sample_is_enough_to_calibrate():
    calibration, fidelity = calibrate(correlated_tokens(1, 30, 8), "klt", 0.999, level=1)
    assert calibration.basis.shape == (8, 8)
    assert fidelity.mean >= 0.999
