"""The estimate's arithmetic."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.shards.tar import write_samples
from cae2pipe.targets.estimate import SHOWINGS, project, recommend_views, tar_bytes


@pytest.mark.parametrize(
    ("views", "terabytes", "hours", "epoch"), [(1, 0.0897, 0.47, 2), (4, 0.3587, 1.9, 5), (8, 0.7175, 3.8, 10)]
)
def test_imagenet_1k(views: int, terabytes: float, hours: float, epoch: int) -> None:
    """70,000 bytes per view, 750 views per second, and a teacher that alone reaches 900."""
    projected = project(1_281_167, views, 70_000, extracted_per_s=750, teacher_per_s=900)
    assert projected.bytes / 1e12 == pytest.approx(terabytes, rel=1e-3)
    assert projected.seconds / 3600 == pytest.approx(hours, rel=0.02)
    assert projected.paid_from_epoch == epoch


def test_extraction_as_fast_as_its_teacher_has_paid_after_as_many_epochs_as_views() -> None:
    assert project(10, 4, 1, extracted_per_s=55.5, teacher_per_s=55.5).paid_from_epoch == 4


@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=8))
def test_tar_bytes_are_those_of_the_tar(jpegs: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write_samples(path, ((f"key{i}", i, jpeg) for i, jpeg in enumerate(jpegs)))
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            members = tar.getmembers()
            end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    assert tar_bytes(jpegs) * len(jpegs) == end


@given(st.integers(1, 5000))
def test_no_recommended_view_is_shown_too_often_and_none_is_too_many(epochs: int) -> None:
    views = recommend_views(epochs)
    assert views >= 1
    assert epochs / views <= SHOWINGS
    assert views == 1 or epochs / (views - 1) > SHOWINGS
