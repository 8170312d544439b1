"""Pictures of comparisons: neighbours by hand, and every picture in its position."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from cae2pipe.reporting.gallery import Gallery, MaskRow, NeighbourRow, gallery_html, nearest_views
from cae2pipe.reporting.html import join_html
from cae2pipe.training.student import LatentPreview
from tests.reporting.test_html import read

VIEWS = [np.full((8, 8, 3), 20 * number, dtype=np.uint8) for number in range(5)]
MASK = np.array([[True, False], [False, False]])


def preview(seed: int) -> LatentPreview:
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(size=(2, 4, 6)).astype(np.float32)
    return LatentPreview("k", VIEWS[0], MASK, teacher, np.where(MASK.reshape(4, 1), student, 0), 0.25)


def test_neighbours_are_those_of_the_highest_cosine_and_never_the_query():
    features = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, 0]]), dim=1)
    assert nearest_views(features, [0, 2], 2) == [[1, 3], [3, 1]]
    assert [len(near) for near in nearest_views(features, [4], 99)] == [4]


def test_the_page_holds_what_there_is():
    gallery = Gallery(
        masks=[MaskRow("block, <1 of 4> hidden", VIEWS[:2], [MASK, MASK])],
        previews={"teacher": {"both": [preview(0), preview(1)], "other": [preview(0), preview(1)]}},
        views=VIEWS,
        queries=[0],
        neighbours=[NeighbourRow("teacher", [[1, 2]]), NeighbourRow("both", [[3, 4]])],
        left_out=["far <one> (no checkpoint)"],
    )
    reader = read(join_html(gallery_html(gallery)))
    pictures = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    assert pictures.count("A view with block, <1 of 4> hidden") == 2
    assert pictures.count("Latents of the teacher as colours") == 2
    assert pictures.count("Latents of other as colours") == 2
    assert pictures.count("The query") == 2
    assert pictures.count("A neighbour by both") == 2
    assert "0.25" in reader.text
    assert "far <one> (no checkpoint)" in reader.text


def test_an_empty_gallery_has_no_section():
    assert gallery_html(Gallery()) == []
