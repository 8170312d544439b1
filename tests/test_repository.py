"""CI, Makefile, hooks and templates of the repository agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest

from cae2pipe.config.yaml_core import read_yaml

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def make_commands(target: str) -> list[str]:
    """The recipe of a Makefile target, with variables expanded."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]


def test_pre_commit_runs_what_make_check_runs():
    (repo,) = read_yaml((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == make_commands("check")
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repo["hooks"])


def test_continuous_integration_runs_check_docs_and_tests_on_every_python():
    job = read_yaml((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]["tests"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make check", "make docs", "make test"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert job["strategy"]["matrix"]["python"] == re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_ones(form):
    content = read_yaml(form.read_text())
    assert content["name"]
    assert content["description"]
    names = [element["id"] for element in content["body"]]
    assert len(set(names)) == len(names)
    assert names
    assert all(element["type"] in ("input", "textarea", "dropdown", "checkboxes") for element in content["body"])
    assert all(element["attributes"]["label"] for element in content["body"])
