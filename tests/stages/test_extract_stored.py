"""Targets of another teacher from the views that a target set stores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.work_share import parse_part
from cae2pipe.errors import BadInputError, DamageError, MismatchError, SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.repair import repair
from cae2pipe.stages.verify import verify
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents


@pytest.fixture(scope="module")
def settings(extract_settings, second_file):
    def of(**over):
        teacher = {"weights": str(second_file), "name": "second"}
        made = extract_settings(teacher=teacher, **over)
        if "view" not in over:
            made = made.model_copy(update={"view": type(made.view)(), "seed": made.seed})
            made.__pydantic_fields_set__.discard("seed")
            made.__pydantic_fields_set__.discard("view")
        if "views" not in over:
            made.__pydantic_fields_set__.discard("views")
        return made

    return of


@pytest.fixture(scope="module", params=["replayed", "stored"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def source(kind, target_root, stored_root) -> Path:
    return target_root if kind == "replayed" else stored_root


@pytest.fixture(scope="module")
def expected(kind, source, tmp_path_factory, extract_settings, second_file, target_root) -> Path:
    """The second teacher's set, made from the originals."""
    out = tmp_path_factory.mktemp("originals") / "set"
    over = {"teacher": {"weights": str(second_file), "name": "second"}, "view": {"pixels": kind}}
    extract_targets(target_root / "shards", out, extract_settings(**over), report=Silent())
    return out


def extract(source, out, settings, **options):
    return extract_targets(source, out, settings, report=Silent(), **options)


def test_it_equals_the_set_made_from_the_originals(source, expected, settings, tmp_path, kind):
    before = contents(source)
    made = extract(source, tmp_path / "set", settings())
    assert made.complete
    assert contents(tmp_path / "set") == contents(expected)
    assert contents(source) == before
    unit = TargetSet(source).stores["v00/000000"]
    assert (source / unit["tar"]).stat().st_ino == (tmp_path / "set" / unit["tar"]).stat().st_ino
    assert not verify(tmp_path / "set", Silent()).problems


def test_parts_workers_and_growth_give_the_same_set(source, expected, settings, tmp_path):
    out = tmp_path / "set"
    extract(source, out, settings(views=1))
    assert TargetSet(out).views == 1
    assert TargetsArtifact.open(out).complete
    for part in ("2/2", "1/2"):
        extract(source, out, settings(speed={"workers": 2}), part=parse_part(part))
    assert contents(out) == contents(expected)


def test_what_is_damaged_is_rebuilt_from_the_source(source, expected, settings, tmp_path, second_file):
    out = Path(shutil.copytree(expected, tmp_path / "set"))
    unit = TargetSet(out).stores["v01/000001"]
    (out / unit["tar"]).write_bytes(b"changed")
    (out / unit["zarr"] / "samples/c/0/0").unlink()
    result = verify(out, Silent())
    assert len(result.problems) == 2
    repair(result, Silent(), source=source, weights=second_file, workers=0)
    assert contents(out) == contents(expected)


def test_a_part_of_the_views_is_completed_when_the_source_has_grown(
    kind, source, expected, settings, extract_settings, tmp_path, target_root
):
    grown = tmp_path / "source"
    first = extract_settings(view={"pixels": kind})
    extract(target_root / "shards", grown, first, part=parse_part("1/2"))
    made = extract(grown, tmp_path / "set", settings())
    assert not made.complete
    assert made.facts["wanted"]["images"] == 150
    assert 0 < len(TargetSet(made.root).stores) < len(TargetSet(source).stores)
    extract(target_root / "shards", grown, first)
    assert extract(grown, tmp_path / "set", settings()).complete
    assert contents(tmp_path / "set") == contents(expected)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"view": {"flip": 0.25}}, "view.flip is 0.25, and the views of the source were made with 0.5"),
        ({"view": {"size": 64}}, "view.size is 64"),
        ({"seed": 4}, "seed is 4, and the views of the source were made with 0"),
    ],
)
def test_settings_that_contradict_the_source_are_refused(target_root, extract_settings, tmp_path, over, words):
    with pytest.raises(MismatchError, match=words):
        extract(target_root, tmp_path / "set", extract_settings(**over))
    assert not (tmp_path / "set").exists()


def test_more_views_than_the_source_has_are_refused(target_root, settings, tmp_path):
    with pytest.raises(SettingsError, match="--views 3, and the source has 2 views"):
        extract(target_root, tmp_path / "set", settings(views=3))


def test_the_source_is_not_the_output(target_root, settings):
    for out in (target_root, target_root / "inside"):
        with pytest.raises(BadInputError, match="the source"):
            extract(target_root, out, settings())
    assert not (target_root / "inside").exists()


def test_a_damaged_source_is_refused(source, settings, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    tar = copy / TargetSet(copy).stores["v01/000001"]["tar"]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamageError, match=r"damaged|changed"):
        extract(copy, tmp_path / "set", settings())
    assert not TargetsArtifact.open(tmp_path / "set").complete


def test_an_estimate_from_a_set_is_that_from_the_originals(kind, source, settings, target_root, extract_settings):
    from cae2pipe.stages.estimate_targets import estimate_targets

    found = estimate_targets(source, settings(), Silent())
    over = {"teacher": {"weights": str(settings().teacher.weights), "name": "second"}, "view": {"pixels": kind}}
    expected = estimate_targets(target_root / "shards", extract_settings(**over), Silent())
    for name in ("images", "views", "pixels"):
        assert found[name] == expected[name]
    assert [row["bytes"] for row in found["codecs"]] == [row["bytes"] for row in expected["codecs"]]
