"""The estimate's arithmetic."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.config.extract import SHOWINGS, ExtractSettings, recommend_views
from cae2pipe.shards.shard_set import Shard
from cae2pipe.shards.tar import write_samples
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.estimate import project, sample_size, speed_sample, tar_bytes


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


def test_the_default_is_what_is_recommended_for_300_epochs() -> None:
    assert ExtractSettings.model_fields["views"].default == recommend_views(300) == 16


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 40), st.integers(1, 10**6))
def test_an_estimate_runs_the_teacher_on_a_quarter_of_the_views_or_two_blocks(
    shards: list[int], views: int, calibration: int
) -> None:
    total = sum(shards) * views
    tasks = speed_sample([Shard(f"{i}", n, Path(), "", "") for i, n in enumerate(shards)], views, total)
    blocks = {(task.shard.name, task.block, view) for task in tasks for view in task.views}
    assert len(blocks) == sum(len(task.views) for task in tasks) > 0
    measured = sum(min(BLOCK, shards[int(name)] - block * BLOCK) for name, block, _ in blocks)
    assert sample_size(total, calibration) + measured <= max(2 * BLOCK, BLOCK + total // 8, total // 4)


def test_the_speed_of_a_large_set_is_measured_on_several_items_for_the_workers_to_share() -> None:
    tasks = speed_sample([Shard(f"{i}", 1024, Path(), "", "") for i in range(3)], 16, 3 * 1024 * 16)
    assert [len(task.views) for task in tasks] == [8, 8, 8, 8]
