"""pyproject.toml agrees with the tree and the pages."""

import re
import tomllib
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from cae2pipe.config.base import preset_names
from cae2pipe.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.mark.parametrize("name", ["stages", "configs", "data_manifests"])
def test_folders_at_the_top_are_linked_into_the_package(name):
    assert (ROOT / "cae2pipe" / name).readlink() == Path("..", name)


def test_all_that_is_packaged_lies_in_the_package(setuptools_table):
    packages = find_namespace_packages(str(ROOT), **setuptools_table["packages"]["find"])
    assert {name.partition(".")[0] for name in packages} == {"cae2pipe"}
    modules = {"cae2pipe.stages"} | {f"cae2pipe.{path.parent.name}" for path in (ROOT / "cae2pipe").glob("*/*.py")}
    assert modules <= set(packages)


def test_every_preset_is_packaged(setuptools_table):
    patterns = setuptools_table["package-data"]["cae2pipe.configs"]
    packaged = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert packaged == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
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
