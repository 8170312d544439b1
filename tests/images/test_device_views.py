"""Views rendered in batches with torch: every pixel equals that of ``render_view``."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.images import device_views
from cae2pipe.images.device_views import bicubic_taps, blended, luminance, render_views
from cae2pipe.images.views import ORDERS, ViewDraw, draw_view, render_view

FACTORS = (0.0, 0.6, 1.0, 1.0000001, 1.4, 2.7, -0.3)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (3, height, width) of two tones and noise: the grey mean of a part differs from that of the whole."""
    pixels = np.random.default_rng(seed).integers(0, 136, size=(height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] += 120
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def by_pillow(images: list[Tensor], draws: list[ViewDraw], size: int) -> Tensor:
    chosen = ViewSettings.model_construct(size=size)
    return torch.stack([from_pillow(render_view(to_pillow(i), d, chosen)) for i, d in zip(images, draws, strict=True)])


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rows(draws: list[ViewDraw]) -> np.ndarray:
    return np.stack([draw.to_row() for draw in draws])


def drawn(shapes: list[tuple[int, int]], size: int) -> tuple[list[Tensor], list[ViewDraw]]:
    """An image and a draw for each shape."""
    chosen = ViewSettings.model_construct(size=size)
    draws = [draw_view(chosen, 0, "key", view=view, height=h, width=w) for view, (h, w) in enumerate(shapes)]
    return [noise(*shape, seed=view) for view, shape in enumerate(shapes)], draws


# From one pixel to more than a block's, and strips that are reduced far more than photographs.
sides = st.one_of(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.tuples(st.integers(1, 3), st.integers(1, 700)),
    st.tuples(st.integers(1, 700), st.integers(1, 3)),
)


@st.composite
def adversarial(draw: st.DrawFn) -> ViewDraw:
    """Any box in any image, with any factors."""
    tall, wide = draw(sides)
    height, width = (draw(st.sampled_from((1, side)) | st.integers(1, side)) for side in (tall, wide))
    top, left = draw(st.integers(0, tall - height)), draw(st.integers(0, wide - width))
    factor = st.sampled_from(FACTORS) | st.floats(-0.5, 2.5)
    factors = [draw(factor) for _ in range(3)]
    order = draw(st.integers(0, len(ORDERS) - 1))
    return ViewDraw(top, left, height, width, draw(st.booleans()), *factors, order, tall, wide)


@settings(max_examples=120)
@given(shapes=st.lists(sides, min_size=1, max_size=12), size=st.integers(8, 64))
def test_drawn_views_are_pillows_bit_for_bit(shapes, size):
    images, draws = drawn(shapes, size)
    got = render_views(images, rows(draws), size)
    assert (got.dtype, got.is_contiguous()) == (torch.uint8, True)
    assert torch.equal(got, by_pillow(images, draws, size))


@settings(max_examples=200)
@given(draws=st.lists(adversarial(), min_size=1, max_size=12), size=st.integers(8, 64))
def test_any_views_are_pillows_bit_for_bit(draws, size):
    images = [noise(draw.source_height, draw.source_width, seed=view) for view, draw in enumerate(draws)]
    assert torch.equal(render_views(images, rows(draws), size), by_pillow(images, draws, size))


@pytest.mark.parametrize("order", range(6))
def test_every_order_with_every_factor(order):
    factors = list(itertools.product(FACTORS, repeat=3))
    draws = [ViewDraw(3, 5, 21, 30, bool(n % 2), *each, order, 50, 61) for n, each in enumerate(factors)]
    images = [noise(50, 61, seed=view) for view in range(len(draws))]
    assert torch.equal(render_views(images, rows(draws), 16), by_pillow(images, draws, 16))


def test_real_photographs(real):
    images, draws = [], []
    for view, path in enumerate(sorted((real / "imagenet-samples").rglob("*.JPEG"))[:24]):
        image = from_pillow(Image.open(path).convert("RGB").reduce(1 + view % 2))
        images.append(image)
        height, width = image.shape[1:]
        draws.append(draw_view(ViewSettings(), 1, path.stem, view=view, height=height, width=width))
    assert torch.equal(render_views(images, rows(draws), 224), by_pillow(images, draws, 224))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_blending_is_pillows_for_all_pairs_of_values(kind):
    base, top = (torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256))
    images = [Image.fromarray(values.to(torch.uint8).reshape(256, 256).numpy()) for values in (base, top)]
    rng = np.random.default_rng(0)
    for factor in (*FACTORS, *rng.uniform(-0.5, 2.5, 60), *(1 + rng.uniform(-1e-6, 1e-6, 20))):
        wanted = torch.from_numpy(np.array(Image.blend(*images, factor))).flatten()
        single = torch.tensor(factor, dtype=torch.float32).to(kind)
        got = blended(base.to(torch.int16), top.to(torch.uint8).expand(3, -1), single.expand(1))
        assert torch.equal(got, wanted.expand(3, -1))


def test_luminance_is_pillows_for_all_colours():
    side = torch.arange(256, dtype=torch.uint8)
    for red in range(0, 256, 5):
        planes = torch.stack(
            [torch.full((256, 256), red, dtype=torch.uint8), *torch.meshgrid(side, side, indexing="ij")]
        )
        wanted = torch.from_numpy(np.array(to_pillow(planes).convert("L")))
        assert torch.equal(luminance(planes), wanted.to(torch.int16))


@settings(max_examples=200)
@given(length=st.integers(1, 5000), size=st.integers(1, 256))
def test_taps_resample_a_row_as_pillow_does(length, size):
    row = np.random.default_rng(length).integers(0, 256, (1, length), dtype=np.uint8)
    wanted = np.array(Image.fromarray(row).resize((size, 1), Image.Resampling.BICUBIC))[0]
    first, weights = bicubic_taps(length, size)
    places = np.minimum(first + np.arange(len(weights))[:, None], length - 1)
    total = (row[0, places].astype(np.int64) * weights).sum(0) + (1 << 21)
    assert (np.clip(total >> 22, 0, 255) == wanted).all()
    assert abs(total).max() < 2**31


class Live(TorchDispatchMode):
    """Peak bytes of tensors created within it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, list | tuple) else [results]:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self.storages[reference.cdata] = (reference, storage.nbytes())
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return results


@pytest.mark.parametrize(("shape", "size"), [((90, 120), 16), ((40, 50), 64)], ids=["images", "views"])
def test_groups_bound_what_is_taken_at_once(shape, size, monkeypatch):
    """The cases with the highest memory of jitter and of resampling. Order is kept across groups."""
    images, draws = drawn([shape] * 60, size)
    wanted = by_pillow(images, draws, size)
    monkeypatch.setattr(device_views, "GROUP_BYTES", 2**23)
    with Live() as live:
        got = render_views(images, rows(draws), size)
    assert torch.equal(got, wanted)
    # In addition to the groups: the views themselves, and the plan's tables.
    assert 2**22 < live.most < 2**23 + got.nbytes + 2**19


def test_a_view_beyond_the_bound_is_rendered_by_itself(monkeypatch):
    images, draws = drawn([(30, 40), (50, 20), (9, 9)], 16)
    monkeypatch.setattr(device_views, "GROUP_BYTES", 1)
    assert torch.equal(render_views(images, rows(draws), 16), by_pillow(images, draws, 16))


def test_compiled_functions_are_whole_graphs_and_give_the_same():
    counter = CompileCounterWithBackend("aot_eager")
    try:
        for batch in range(3):
            shapes = [(40 + view + batch, 60 - view) for view in range(18 + 5 * batch)]
            images, draws = drawn(shapes, 47)
            got = render_views(images, rows(draws), 47, backend=counter)
            assert torch.equal(got, by_pillow(images, draws, 47))
            # Three ways to jitter, by what comes before contrast, and resampling across and down.
            assert counter.frame_count <= 5
    finally:
        torch.compiler.reset()


def test_memory_need_not_be_in_order():
    """Layout of decoders: rows of pixels, not planes. Draws may be a tensor."""
    images, draws = drawn([(30, 40), (50, 20)], 16)
    across = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    got = render_views(across, torch.from_numpy(rows(draws)), 16)
    assert torch.equal(got, by_pillow(images, draws, 16))


def test_a_draw_of_another_image_is_refused():
    images, draws = drawn([(30, 40), (40, 30)], 16)
    with pytest.raises(ImageError, match="40 x 30 pixels, but this one has 30 x 40") as caught:
        render_views([images[1], images[1]], rows(draws), 16)
    assert caught.value.where == "image 0 of the batch"


@pytest.mark.parametrize(("column", "value"), [(0, -1), (1, 11), (2, 0), (3, 41)])
def test_a_box_that_leaves_its_image_is_refused(column, value):
    draws = np.array([[0, 0, 30, 40, 0, 1, 1, 1, 0, 30, 40.0], [0, 10, 30, 30, 0, 1, 1, 1, 0, 30, 40]])
    draws[1, column] = value
    with pytest.raises(ImageError, match="not inside its image of 40 x 30") as caught:
        render_views([noise(30, 40)] * 2, draws, 16)
    assert caught.value.where == "image 1 of the batch"


def test_an_empty_batch_or_one_of_other_draws_is_refused():
    images, draws = drawn([(30, 40), (50, 20)], 16)
    for some, own in (([], np.zeros((0, 11))), (images[:1], rows(draws)), (images, rows(draws)[:, :10])):
        with pytest.raises(ValueError, match="one row per image"):
            render_views(some, own, 16)
