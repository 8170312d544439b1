"""How many bytes do latents take at a low fidelity, with known methods, at equal bytes and equal cosines?

Every method codes the same tokens, of images that nothing was fitted to, at the same mean cosine. The parameter that
sets its rate (a step, or a number of codewords) is searched for on the measured tokens themselves. Bytes are those of
the chunks, compressed by Blosc and with checksums. Norms and attention, the same for all, are not counted, nor are
bases and codebooks. Vector quantisers take an integer number of bytes per token: in between, bytes are interpolated.

    python -m benchmarks.codec_low_rate [--quick] [--out benchmarks/results/codec_low_rate-cpu.json]
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import at_most, figures, finish, in_turns, median_ratio, parse_options
from benchmarks.quantisers import Points, product, residual
from benchmarks.sample import crops, packed, photographs, settings, teacher_of
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.calibration import Fidelity, calibrate, make_codec, summarise, token_cosines
from cae2pipe.targets.chunks import BLOCK, SHUFFLES, encode_chunk
from cae2pipe.targets.codecs import as_tensors, round_biased, rounding_bias, unit_tokens, zigzag
from cae2pipe.targets.rendering import Renderer, Task, render_blocks
from cae2pipe.targets.store import unpack_array
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.store_writing import pack_symbols
from cae2pipe.teachers.protocol import Teacher

FIDELITIES = (0.999, 0.99, 0.97, 0.95, 0.9)
KEPT = (0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of kept components to try."""


class Bases(NamedTuple):
    """Fitted values: ``mean`` (D,), ``basis`` (D, D), axes along the tokens (T, T), spreads (T, D) along both axes."""

    mean: Tensor
    basis: Tensor
    along: Tensor
    spread: Tensor


class Scalar(NamedTuple):
    """A scalar quantiser: tokens to bins (n, T, D) at a step, bins to tokens, bins in the chunk's layout, which is (D,
    n, T); and options of packing."""

    bins: Callable[[float], Tensor]
    tokens: Callable[[Tensor, float], Tensor]
    laid: Callable[[Tensor], Tensor]
    level: int = 1
    dtype: str = "<u2"


def main() -> None:
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    checks, speeds = [], {}
    for size, (fit, test) in samples(options.device, options.quick):
        by_method = compared(fit, test)
        rows += [{"pixels": size, "method": name, **row} for name, row in by_method.items()]
        timed = timings(fit, test, 3 if options.quick else 9)
        speeds[size] = {name: figures(values, 0) for name, values in timed.items()}
        ratio = median_ratio(timed[f"{TOKENS}/decode"], timed["klt/decode"])
        share = by_method["klt"]["0.97"] / by_method[TOKENS]["0.97"]
        checks += [
            at_most(f"{size} pixels, 0.97: bytes of klt against rotating components alone", share, 0.9),
            at_most(f"{size} pixels, 0.97: time of decoding klt, likewise", ratio, 1.15),
        ]
    sizes = {"views_per_s_at_0.97": speeds, "bytes": "a view, without norms"}
    finish(options, "codec_low_rate", rows, checks, sizes, ("torch", "numcodecs"))


def samples(device: str, quick: bool) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Unit tokens to fit on, and unit tokens of other images to measure on, at 112 and 224 pixels."""
    for size, source in ((112, crops), (224, lambda scratch: photographs(scratch, 96))):
        with tempfile.TemporaryDirectory() as scratch:
            over = {"view": {"size": size}}
            chosen = settings(device, Path(scratch), **over)
            chosen = chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update={"image_size": size})})
            shards, teacher = packed(source(Path(scratch)), Path(scratch), chosen), teacher_of(chosen)
            views = 4 if quick else 6
            # There are few photographs: several views of 64 photographs, or one view of as many other photographs.
            fitted = [(block, (0,)) for block in range(views)] if size == 112 else [(0, tuple(range(views)))]
            measured = [(block, (1,)) for block in (8, 9)] if size == 112 else [(1, (0, 1, 2, 3))]
            yield size, (unit_of(shards, teacher, chosen, fitted), unit_of(shards, teacher, chosen, measured))


def unit_of(shards: ShardSet, teacher: Teacher, chosen: Any, parts: list[tuple[int, tuple[int, ...]]]) -> Tensor:
    tasks = [Task(shards.shards[0], block, views) for block, views in parts]
    blocks = render_blocks(Renderer(shards, tasks, chosen.view, seed=chosen.seed), 0)
    with torch.inference_mode():
        raw = [teacher(view.to(teacher.device)).tokens.cpu() for block in blocks for view in block.pixels]
    return unit_tokens(torch.cat(raw).clone())[0]


TOKENS = "components alone"


def compared(fit: Tensor, test: Tensor) -> dict[str, dict[str, Any]]:
    """Bytes of every method at every fidelity."""
    calibration, _ = calibrate(fit, "klt", 0.97, level=1)
    assert calibration.basis is not None
    assert calibration.token_basis is not None
    assert calibration.spread is not None
    bases = Bases(calibration.mean, calibration.basis, calibration.token_basis, calibration.spread)
    methods = scalars(fit, test, bases)
    sizes: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for fidelity in FIDELITIES:
        for name, method in methods.items():
            step = largest(lambda step, method=method: cosine(test, method, step), fidelity)
            if step is None:
                continue
            bins = method.bins(step)
            sizes[name][str(fidelity)] = chunk_bytes(method.laid(bins), method)
            if fidelity == 0.97:
                reached = quality(test, method.tokens(bins, step), bases.mean)
                sizes[name] |= {"p1 at 0.97": round(reached.p1, 4), "centred at 0.97": round(reached.centred_mean, 4)}
            if name in (TOKENS, "klt"):
                bound = f"{name}: entropy of its rows, order 0"
                sizes.setdefault(bound, {})[str(fidelity)] = round(entropy(method.laid(bins)) / len(test))
    kept = [name for name in methods if "components kept" in name]
    for fidelity in map(str, FIDELITIES):
        best = [sizes[name][fidelity] for name in kept if fidelity in sizes[name]]
        if best:
            sizes.setdefault("the same, the best count of components kept", {})[fidelity] = min(best)
    for name in kept:
        del sizes[name]
    sizes["product quantisation, 256 codewords a part"] = between(product(fit, test, bases.mean, bases.basis))
    sizes["residual quantisation, 256 codewords a stage"] = between(residual(fit, test, bases.mean, bases.basis))
    return sizes


def scalars(fit: Tensor, test: Tensor, bases: Bases) -> dict[str, Scalar]:
    n, tokens, dim = test.shape
    mean, basis, along, spread = bases
    rotated, fitted = ((unit - mean) @ basis for unit in (test, fit))
    by_component = fitted.square().mean((0, 1)).sqrt()

    def laid(bins: Tensor) -> Tensor:
        return bins.permute(2, 0, 1)

    def plain(bins: Tensor, step: float) -> Tensor:
        return bins * step @ basis.T + mean

    def kept(count: int) -> Scalar:
        mask = (torch.arange(dim) < count).float()
        return Scalar(lambda step: torch.round(rotated / step) * mask, plain, laid)

    def two_axes(axes: Tensor, spreads: Tensor, biased: bool, ranked: bool) -> Scalar:
        planes = axes.T @ rotated
        order = spreads.flatten().argsort(descending=True, stable=True)

        def bins(step: float) -> Tensor:
            return round_biased(planes / step, rounding_bias(spreads, step) if biased else torch.zeros(()))

        def sorted_(bins: Tensor) -> Tensor:
            return bins.reshape(n, -1)[:, order].reshape(n, dim, tokens).transpose(0, 1)

        return Scalar(bins, lambda bins, step: plain(axes @ bins, step), sorted_ if ranked else laid)

    alone = Scalar(lambda step: torch.round(rotated / step), plain, laid)
    cosines = grid_cosines(tokens)
    of_cosines = (cosines.T @ fitted).square().mean(0).sqrt()
    klt = two_axes(along, spread, True, True)
    return {
        TOKENS: alone,
        "the same, zstd level 9": alone._replace(level=9),
        "the same, uint8 where symbols fit": alone._replace(dtype="|u1"),
        "the same, rounded by rate": Scalar(
            lambda step: round_biased(rotated / step, rounding_bias(by_component, step)), plain, laid
        ),
        **{f"{share} of the components kept": kept(round(share * dim)) for share in KEPT},
        "the same, less a prediction from left and upper": predicted(fitted, rotated, plain),
        "2-D DCT, laid by component": two_axes(cosines, of_cosines, False, False),
        "2-D DCT, in the order of spreads, rounded by rate": two_axes(cosines, of_cosines, True, True),
        "klt, rounded to the nearest": two_axes(along, spread, False, True),
        "klt": klt,
        "klt, zstd level 9": klt._replace(level=9),
    }


def grid_cosines(tokens: int) -> Tensor:
    """(T, T), axes in columns: the class token by itself, and the 2-D DCT of a square grid."""
    side = math.isqrt(tokens - 1)
    places = torch.arange(side, dtype=torch.float64)
    one = torch.cos(math.pi / side * (places + 0.5).unsqueeze(1) * places) * (2 / side) ** 0.5
    one[:, 0] /= 2**0.5
    return torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.kron(one, one)).float()


def predicted(fitted: Tensor, rotated: Tensor, plain: Callable[[Tensor, float], Tensor]) -> Scalar:
    """Each patch minus a prediction from its decoded left, upper and upper left neighbours; weights per component."""
    side = math.isqrt(rotated.shape[1] - 1)

    def neighbours(grid: Tensor, row: int, col: int) -> Tensor:
        zero = torch.zeros_like(grid[:, 0, 0])
        places = ((row, col - 1), (row - 1, col), (row - 1, col - 1))
        return torch.stack([grid[:, r, c] if r >= 0 and c >= 0 else zero for r, c in places], -1)

    def grid_of(values: Tensor) -> Tensor:
        return values[:, 1:].reshape(len(values), side, side, -1)

    known = torch.stack([neighbours(grid_of(fitted), r, c) for r in range(side) for c in range(side)], 1)
    known = known.permute(2, 0, 1, 3).flatten(1, 2).double()
    wanted = fitted[:, 1:].permute(2, 0, 1).flatten(1).double().unsqueeze(-1)
    weights = torch.linalg.solve(known.mT @ known + 1e-6 * torch.eye(3), known.mT @ wanted).squeeze(-1).float()

    def walk(given: Tensor, step: float, encode: bool) -> Tensor:
        source, out = grid_of(given), torch.zeros_like(grid_of(given))
        decoded = torch.zeros_like(out)
        for row in range(side):
            for col in range(side):
                guess = (neighbours(decoded, row, col) * weights).sum(-1)
                if encode:
                    out[:, row, col] = torch.round((source[:, row, col] - guess) / step)
                    decoded[:, row, col] = guess + out[:, row, col] * step
                else:
                    out[:, row, col] = decoded[:, row, col] = guess / step + source[:, row, col]
                    decoded[:, row, col] *= step
        first = torch.round(given[:, :1] / step) if encode else given[:, :1]
        return torch.cat([first, out.flatten(1, 2)], 1)

    return Scalar(
        lambda step: walk(rotated, step, True),
        lambda bins, step: plain(walk(bins, step, False), step),
        lambda bins: bins.permute(2, 0, 1),
    )


def largest(mean_cosine: Callable[[float], float], fidelity: float) -> float | None:
    """The largest step, to 0.3%, at which the mean cosine is at least the fidelity; None if it never is."""
    low, high = 1e-3, 1.0
    if mean_cosine(low) < fidelity:
        return None
    while high / low > 1.003:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean_cosine(middle) >= fidelity else (low, middle)
    return low


def cosine(test: Tensor, method: Scalar, step: float) -> float:
    return float(torch.cosine_similarity(test, method.tokens(method.bins(step), step), dim=-1).mean())


def quality(test: Tensor, decoded: Tensor, mean: Tensor) -> Fidelity:
    return summarise(*token_cosines(test, decoded, mean))


def chunk_bytes(laid: Tensor, method: Scalar) -> int:
    """Bytes per view of whole blocks, with the shuffle that gives fewer."""
    symbols = zigzag(laid.int())
    dtype = "<u2" if int(symbols.max()) > 255 else method.dtype
    blocks = [block.contiguous().numpy().astype(dtype) for block in symbols.split(BLOCK, 1)]
    sizes = [sum(len(encode_chunk(b, method.level, name)) for b in blocks) for name in SHUFFLES]
    return round(min(sizes) / symbols.shape[1])


def entropy(laid: Tensor) -> float:
    """Bytes of an ideal coder that knows the frequency of every symbol in each row (of D)."""
    symbols, bits = zigzag(laid.int()).flatten(1), 0.0
    for row in symbols:
        share = torch.bincount(row).double() / len(row)
        bits -= float((share * share.clamp_min(1e-30).log2()).sum()) * len(row)
    return bits / 8


def between(points: Points) -> dict[str, Any]:
    """Bytes at every reachable fidelity, interpolated linearly in the logarithm of the distance."""
    sizes: dict[str, Any] = {}
    for fidelity in FIDELITIES:
        for (few, low), (many, high) in pairwise(points):
            if low <= fidelity <= high:
                share = math.log((1 - low) / (1 - fidelity)) / math.log((1 - low) / (1 - high))
                sizes[str(fidelity)] = round(few + share * (many - few))
    size, reached = points[-1]
    return {**sizes, "reaches": f"{reached:.4f} at {size}"}


def timings(fit: Tensor, test: Tensor, rounds: int) -> dict[str, list[float]]:
    """Views per second of CPU time of one core at 0.97: tokens to chunk, chunk to symbols, chunk to tokens."""
    measures = {}
    whole = test.split(BLOCK)
    for name, rotated in (("klt", True), (TOKENS, False)):
        codec = make_codec("klt", calibrate(fit, "klt", 0.97, level=1, rotate_tokens=rotated)[0])
        layout = StoreLayout(test.shape[1], test.shape[2], test.shape[1] - 1, False, codec)

        def pack(block: Tensor, codec=codec) -> list[bytes]:
            return pack_symbols(codec.encode(block)["symbols"], codec.level)

        def unpack(chunks: list[bytes], layout=layout) -> dict[str, Any]:
            return unpack_array(layout, "symbols", chunks, BLOCK)

        def decode(chunks: list[bytes], codec=codec, unpack=unpack) -> Tensor:
            return codec.decode(as_tensors(unpack(chunks)))

        chunks = [pack(block) for block in whole]
        for what, work, inputs in (("encode", pack, whole), ("unpack", unpack, chunks), ("decode", decode, chunks)):
            measures[f"{name}/{what}"] = partial(own_rate, work, inputs)
    return in_turns(measures, rounds)


def own_rate(work: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Views per second of this process's CPU time, which other load on the machine does not change."""
    began = time.process_time()
    for each in inputs:
        work(each)
    return len(inputs) * BLOCK / (time.process_time() - began)


if __name__ == "__main__":
    main()
