"""Views: drawn as in torchvision, depending only on a key; rendered bit for bit in the published order."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.images.views import (
    DRAW_COLUMNS,
    ORDERS,
    ViewDraw,
    draw_view,
    encode_jpeg,
    render_view,
)

PUBLISHED = ViewSettings()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Two tones and noise: the grey mean of a part differs from that of the whole."""
    pixels = np.random.default_rng(seed).integers(0, 120, size=(height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] += 120
    return Image.fromarray(pixels)


def render_view_naive(image: Image.Image, draw: ViewDraw, settings: ViewSettings) -> Image.Image:
    """The published order, each operation torchvision's own, on the full image up to the crop."""
    operations = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
    }
    for name in ORDERS[draw.order]:
        image = operations[name](image, getattr(draw, name))
    if draw.flip:
        image = F.hflip(image)
    # Horizontally first, as every Pillow before 13 does by itself.
    size = [draw.height, settings.size]
    image = F.resized_crop(image, draw.top, draw.left, draw.height, draw.width, size, InterpolationMode.BICUBIC)
    return F.resize(image, [settings.size, settings.size], InterpolationMode.BICUBIC)


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    view=st.integers(0, 1000),
    size=st.integers(16, 48),
    jitter=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_rendering_is_the_published_order_bit_for_bit(height, width, view, size, jitter):
    chosen = ViewSettings(size=size, jitter=jitter)
    image = noise(height, width, seed=view)
    draw = draw_view(chosen, 0, "key", view=view, height=height, width=width)
    result = render_view(image, draw, chosen)
    assert result.mode == "RGB"
    assert result.size == (size, size)
    assert result.tobytes() == render_view_naive(image, draw, chosen).tobytes()
    assert render_view(image, draw, chosen, image.convert("L")).tobytes() == result.tobytes()


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("flip", [False, True])
def test_every_order_and_both_flips_on_an_off_centre_box(order, flip):
    chosen = ViewSettings(size=32)
    draw = ViewDraw(3, 5, 21, 30, flip, 1.37, 0.63, 1.21, order, 50, 61)
    image = noise(50, 61)
    assert render_view(image, draw, chosen).tobytes() == render_view_naive(image, draw, chosen).tobytes()


def test_real_photographs_bit_for_bit(real):
    for number, path in enumerate(sorted((real / "imagenet-samples").rglob("*.JPEG"))[:12]):
        image = Image.open(path).convert("RGB")
        draw = draw_view(PUBLISHED, 1, path.stem, view=number, height=image.height, width=image.width)
        assert render_view(image, draw, PUBLISHED).tobytes() == render_view_naive(image, draw, PUBLISHED).tobytes()


def test_rendering_leaves_the_image_as_it_was():
    image = noise(40, 50)
    before = image.tobytes()
    for view in range(12):
        render_view(image, draw_view(PUBLISHED, 0, "key", view=view, height=40, width=50), PUBLISHED)
    assert image.tobytes() == before


def test_a_draw_of_another_image_is_refused():
    draw = draw_view(PUBLISHED, 0, "key", view=0, height=40, width=50)
    with pytest.raises(ImageError, match="50 x 40"):
        render_view(noise(50, 40), draw, PUBLISHED)


def test_a_draw_is_pinned():
    # The format guarantees these views for these keys, so the values must not change.
    draw = draw_view(PUBLISHED, 0, "n01440764+n01440764_10026", view=3, height=375, width=500)
    assert draw == ViewDraw(
        top=1,
        left=67,
        height=362,
        width=347,
        flip=True,
        brightness=1.2085130451588657,
        contrast=1.2514580922459306,
        saturation=0.6730450561568077,
        order=0,
        source_height=375,
        source_width=500,
    )


def test_a_draw_depends_on_each_of_its_arguments():
    def draw(seed=0, key="key", view=0, height=300, width=400):
        return draw_view(PUBLISHED, seed, key, view=view, height=height, width=width)

    assert draw() == draw()
    others = [draw(seed=1), draw(key="kez"), draw(view=1), draw(width=401)]
    assert len({draw(), *others}) == 5


def test_jitter_and_flip_do_not_depend_on_how_many_boxes_are_tried():
    # 1000 x 20 pixels: every try fails, and the fallback is taken
    plain, extreme = (draw_view(PUBLISHED, 0, "key", view=0, height=h, width=w) for h, w in ((300, 300), (1000, 20)))
    columns = [name for name in DRAW_COLUMNS if name in ("flip", "brightness", "contrast", "saturation", "order")]
    assert [getattr(plain, name) for name in columns] == [getattr(extreme, name) for name in columns]
    assert (extreme.top, extreme.left, extreme.height, extreme.width) == (486, 0, 27, 20)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 10**6),
    st.sampled_from([(0.4, 1.0), (0.001, 0.002), (1.0, 1.0)]),
)
def test_boxes_lie_inside_the_image(height, width, view, scale):
    draw = draw_view(ViewSettings(scale=scale), 0, "key", view=view, height=height, width=width)
    assert 0 <= draw.top <= draw.top + draw.height <= height
    assert 0 <= draw.left <= draw.left + draw.width <= width
    assert draw.height >= 1
    assert draw.width >= 1
    assert (draw.source_height, draw.source_width) == (height, width)


def largest_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The Kolmogorov-Smirnov statistic of two samples."""
    points = np.concatenate([ours, theirs])
    share = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (ours, theirs)]
    return float(np.abs(share[0] - share[1]).max())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (100, 400), (900, 300)])
def test_boxes_are_distributed_as_torchvision_draws_them(height, width):
    count = 3000
    ours = np.array(
        [draw_view(PUBLISHED, 0, f"key{n}", view=0, height=height, width=width).to_row()[:4] for n in range(count)]
    )
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    crop = RandomResizedCrop(224, PUBLISHED.scale, PUBLISHED.ratio)
    scale, ratio = list(crop.scale), list(crop.ratio)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)], dtype=float)
    # Two samples of one distribution differ by more than this once in 10,000 times.
    bound = math.sqrt(-math.log(0.5e-4) / count)
    for column, name in enumerate(DRAW_COLUMNS[:4]):
        assert largest_gap(ours[:, column], theirs[:, column]) < bound, name
    areas = (rows[:, 2] * rows[:, 3] for rows in (ours, theirs))
    assert largest_gap(*areas) < bound


def test_jitter_flip_and_order_are_distributed_as_set():
    count = 6000
    rows = np.array([draw_view(PUBLISHED, 0, f"key{n}", view=0, height=30, width=40).to_row() for n in range(count)])
    column = {name: rows[:, index] for index, name in enumerate(DRAW_COLUMNS)}
    even = (np.arange(count) + 0.5) / count
    for name in ("brightness", "contrast", "saturation"):
        assert 0.6 <= column[name].min() < 0.61
        assert 1.39 < column[name].max() <= 1.4
        assert largest_gap((column[name] - 0.6) / 0.8, even) < math.sqrt(-math.log(0.5e-4) / 2 / count)
    assert abs(column["flip"].mean() - 0.5) < 4 * 0.5 / math.sqrt(count)
    shares = np.bincount(column["order"].astype(int), minlength=6) / count
    assert len(shares) == 6
    assert np.abs(shares - 1 / 6).max() < 4 * math.sqrt(5 / 36 / count)
    names = ["flip", "brightness", "contrast", "saturation", "order", "top", "height"]
    correlations = np.corrcoef([column[name] for name in names]) - np.eye(len(names))
    correlations[-1, -2] = correlations[-2, -1] = 0  # a taller box has less room to move
    assert np.abs(correlations).max() < 5 / math.sqrt(count)


def test_no_flip_and_no_jitter():
    chosen = ViewSettings(size=16, jitter=0, flip=0, scale=(1, 1), ratio=(1, 1))
    draw = draw_view(chosen, 0, "key", view=0, height=16, width=16)
    image = noise(16, 16)
    assert not draw.flip
    assert render_view(image, draw, chosen).tobytes() == image.tobytes()


def test_rows_keep_draws_whole():
    names = "top left height width flip brightness contrast saturation order source_height source_width"
    assert tuple(names.split()) == DRAW_COLUMNS
    for view in range(20):
        draw = draw_view(PUBLISHED, 0, "key", view=view, height=211, width=307)
        row = draw.to_row()
        assert row.dtype == np.float64
        assert row.shape == (11,)
        again = ViewDraw.from_row(row)
        assert again == draw
        assert [type(value) for value in vars(again).values()] == [type(value) for value in vars(draw).values()]


@pytest.mark.parametrize(("subsampling", "sampling"), [("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)])
def test_stored_views_are_jpegs_as_set(subsampling, sampling):
    view = noise(32, 32)
    data = encode_jpeg(view, ViewSettings(size=32, quality=77, subsampling=subsampling))
    stored = Image.open(io.BytesIO(data))
    assert JpegImagePlugin.get_sampling(stored) == sampling
    buffer = io.BytesIO()
    view.save(buffer, "JPEG", quality=77)
    assert stored.quantization == Image.open(buffer).quantization


def test_what_an_image_carries_beside_its_pixels_is_not_stored():
    plain, laden = noise(32, 32), noise(32, 32)
    laden.info |= {
        "comment": b"by hand",
        "dpi": (300, 300),
        "icc_profile": b"x" * 100,
        "exif": b"Exif\0\0",
        "xmp": b"y",
    }
    assert encode_jpeg(laden, PUBLISHED) == encode_jpeg(plain, PUBLISHED)
