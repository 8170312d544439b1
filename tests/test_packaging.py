"""The wheel is described by hand in pyproject.toml: it must not fall behind the tree."""

import re
import tomllib
from pathlib import Path

import pytest

from cae2pipe.config.base import package_folder, preset_names
from cae2pipe.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_of_modules_is_packaged(setuptools_table):
    rooms = {"cae2pipe"} | {f"cae2pipe.{path.parent.name}" for path in (ROOT / "cae2pipe").glob("*/__init__.py")}
    mapped = {"cae2pipe.stages", "cae2pipe.configs", "cae2pipe.data_manifests"}
    assert set(setuptools_table["packages"]) == rooms | mapped


def test_rooms_have_no_rooms_of_their_own():
    assert not list((ROOT / "cae2pipe").glob("*/*/__init__.py"))


def test_every_preset_is_packaged(setuptools_table):
    patterns = setuptools_table["package-data"]["cae2pipe.configs"]
    packaged = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert packaged == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert package_folder("configs") == ROOT / "configs"
    assert package_folder("data_manifests") == ROOT / "data_manifests"
    assert "base" in preset_names("pretrain")


def test_every_extra_that_an_error_or_a_page_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [ROOT / "README.md"]
    for folder, suffix in {"cae2pipe": "py", "stages": "py", "docs": "md"}.items():
        sources += (ROOT / folder).rglob(f"*.{suffix}")
    named = {name for path in sources for name in re.findall(r"'(?:cae2pipe|\.)\[(\w+)\]", path.read_text())}
    assert {"dense", "nvjpeg", "s3"} <= named <= extras.keys()


def test_version_is_in_the_changelog_and_citation():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
