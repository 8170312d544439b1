"""V: are views rendered on the device equal to those of the CPU, and how many does it render and decode per second?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import at_most, figures, in_turns, rate
from benchmarks.pretrain import wait_for
from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import SettingsError
from cae2pipe.images.device_views import render_views
from cae2pipe.images.jpeg import decode_view, device_decoder
from cae2pipe.images.views import draw_view, encode_jpeg, render_view

RATIOS = (4 / 3, 3 / 4, 3 / 2, 1.0, 16 / 9)
"""Aspect ratios (width / height) of the photographs, used cyclically."""
SHORT_SIDE = 320
DIFFERENT = 64
"""Number of photographs; larger batches contain several views of each."""
BATCHES = (256, 1024)
VIEWS_A_TURN = 2048


def rendering(state: State, found: Found) -> None:
    """Views of images in memory against Pillow's; views of JPEGs decoded on the device against the CPU's; rates."""
    settings = ViewSettings(size=state.scale.image)
    equality(state, found, settings)
    side, different = (state.scale.image * 10 // 7, 8) if state.quick else (SHORT_SIDE, DIFFERENT)
    originals = [photograph(side, RATIOS[n % len(RATIOS)], n) for n in range(different)]
    jpegs = [encode_jpeg(image, settings) for image in originals]
    views = [encode_jpeg(image.resize((settings.size,) * 2), settings) for image in originals]
    try:
        decode = decoding(state)
        found.facts["the device's decoder"] = device_decoder().__module__
    except SettingsError as error:
        found.skipped["nvJPEG"] = error.what
        decode = None
    if decode:
        against_cpu(state, found, settings, jpegs, decode)
    for batch in (24,) if state.quick else BATCHES:
        found.rows += rates(state, settings, jpegs, views, batch, decode)


def equality(state: State, found: Found, settings: ViewSettings) -> None:
    """Number of pixels that differ from ``render_view``'s, for noise of many sizes, eager and compiled."""
    # Boxes larger than twice the view would need other taps, and another compilation.
    count, largest = (24, 60) if state.quick else (256, 440)
    rng = np.random.default_rng(0)
    images, draws = [], []
    for view in range(count):
        height, width = rng.integers(1 if view % 16 == 0 else largest // 10, largest, 2).tolist()
        images.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        draws.append(draw_view(settings, 0, "key", view=view, height=height, width=width))
    pairs = zip(images, draws, strict=True)
    wanted = torch.stack([planes(render_view(Image.fromarray(image), draw, settings)) for image, draw in pairs])
    there = [planes(image).to(state.place) for image in images]
    rows = np.stack([draw.to_row() for draw in draws])
    for name, backend in (("as it is", None), (state.backend, state.backend)):
        got = render_views(there, rows, settings.size, backend=backend)
        different = int((got.cpu() != wanted).sum())
        found.checks.append(at_most(f"{name}: pixels of {count} views that differ from Pillow's", different, 0, 0))
    if state.on_cuda:
        torch.cuda.set_sync_debug_mode("error")
        render_views(there, rows, settings.size)
        torch.cuda.set_sync_debug_mode("default")
        before = torch.cuda.memory_allocated(state.place)
        torch.cuda.reset_peak_memory_stats(state.place)
        got = render_views(there, rows, settings.size)
        peak = torch.cuda.max_memory_allocated(state.place) - before - got.nbytes
        found.facts["temporary bytes a batch, MB"] = round(peak / 1e6, 1)


def against_cpu(
    state: State, found: Found, settings: ViewSettings, jpegs: list[bytes], decode: Callable[[list[bytes]], Any]
) -> None:
    """Views of JPEGs decoded on the device compared with those decoded and rendered on the CPU."""
    pixels = [decode_view(jpeg) for jpeg in jpegs]
    draws = [
        draw_view(settings, 0, "key", view=n, height=image.shape[0], width=image.shape[1])
        for n, image in enumerate(pixels)
    ]
    pairs = zip(pixels, draws, strict=True)
    wanted = torch.stack([planes(render_view(Image.fromarray(image), draw, settings)) for image, draw in pairs])
    got = render_views(decode(jpegs), np.stack([draw.to_row() for draw in draws]), settings.size)
    apart = (got.cpu().int() - wanted.int()).abs()
    mean = float(apart.float().mean())
    found.facts["decoded and rendered against the CPU's"] = {"mean": round(mean, 4), "worst": int(apart.max())}
    # Noise has more chroma than photographs, and decoders differ in chroma; part D checks photographs.
    found.goals.append(at_most("decoded and rendered against the CPU's, noise, mean difference", mean, 4.0))


def rates(
    state: State,
    settings: ViewSettings,
    jpegs: list[bytes],
    views: list[bytes],
    batch: int,
    decode: Callable[[list[bytes]], Any] | None,
) -> list[dict[str, Any]]:
    """Views per second of a batch, measured in turns."""
    size, backend = settings.size, state.backend
    chosen = [jpegs[n % len(jpegs)] for n in range(batch)]
    pixels = [decode_view(jpeg) for jpeg in jpegs]
    images = [planes(pixels[n % len(pixels)]).to(state.place) for n in range(batch)]
    rows = np.stack(
        [
            draw_view(settings, 0, "key", view=n, height=i.shape[1], width=i.shape[2]).to_row()
            for n, i in enumerate(images)
        ]
    )
    work: dict[str, Callable[[], Any]] = {
        "rendered": lambda: render_views(images, rows, size),
        f"rendered, compiled by {backend}": lambda: render_views(images, rows, size, backend=backend),
    }
    if decode:
        stored = [views[n % len(views)] for n in range(batch)]
        work |= {
            f"decoded, short side {min(images[0].shape[1:])}": lambda: decode(chosen),
            "decoded and rendered": lambda: render_views(decode(chosen), rows, size),
            f"decoded and rendered, compiled by {backend}": lambda: render_views(
                decode(chosen), rows, size, backend=backend
            ),
            f"stored views of {size} decoded": lambda: decode(stored),
        }
    times = 1 if state.quick else VIEWS_A_TURN // batch
    measures = {name: turn(one, times, batch, state.place) for name, one in work.items()}
    found = in_turns(measures, 1 if state.quick else 3)
    return [{"what": name, "batch": batch, "views/s": figures(values)} for name, values in found.items()]


def turn(work: Callable[[], Any], times: int, batch: int, device: torch.device) -> Callable[[], float]:
    """A measure: views per second of repeated work, including the device's part."""

    def whole() -> None:
        for _ in range(times):
            work()
        wait_for(device)

    return lambda: rate(whole, times * batch)


def decoding(state: State) -> Callable[[list[bytes]], list[Tensor]]:
    """The device's decoder for JPEGs of any sizes: uint8 (3, h, w) each, complete when it returns.

    Raises:
        SettingsError: there is no decoder for a device.
    """
    decoder = device_decoder()

    def decode(jpegs: list[bytes]) -> list[Tensor]:
        data = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        wait_for(state.place)  # see decode_jpegs
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
            return list(decoder(data, mode="RGB", device=state.place))

    return decode


def photograph(side: int, ratio: float, number: int) -> Image.Image:
    """Coloured noise with some structure; its shorter side is ``side``."""
    width, height = (round(side * max(1.0, each)) for each in (ratio, 1 / ratio))
    coarse = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def planes(pixels: Any) -> Tensor:
    """uint8 (3, h, w) of an image or an array (h, w, 3)."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
