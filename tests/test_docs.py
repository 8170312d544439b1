"""The Markdown files of the repository: what they link to and what they name is there."""

import functools
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
NAMES_PATH = re.compile(
    r"(?:\.ci|\.github|benchmarks|cae2pipe|configs|data_manifests|docs|stages|tests)(?:/[\w.*-]+)+/?"
)
"""What in code spans is taken for a path of the repository."""


@functools.cache
def inline(page: Path) -> list[list[Token]]:
    """The inline tokens of each paragraph, heading and table cell; code blocks are none of them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token.children or [] for token in tokens if token.type == "inline"]


@functools.cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    slugs: Counter[str] = Counter()
    names = set()
    for heading, token in itertools.pairwise(tokens):
        if heading.type != "heading_open":
            continue
        text = "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        names.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return names


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    broken = []
    for token in (token for line in inline(page) for token in line):
        target = token.attrs.get("href" if token.type == "link_open" else "src")
        if target is None or re.match(r"[a-z]+:", str(target)):
            continue
        path, _, anchor = str(target).partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.is_relative_to(ROOT) or not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(str(target))
    return broken


def code_spans(page: Path) -> list[str]:
    return [token.content for line in inline(page) for token in line if token.type == "code_inline"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_that_a_page_names_exist(page):
    paths = [span.split("::")[0] for span in code_spans(page) if NAMES_PATH.fullmatch(span.split("::")[0])]
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_docs.ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# The same\n\n## `code`, and more\n\n# The same\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[a](b.md) [b](b.md#the-same-1) ![c](c.png) [d](b.md#code-and-more) [e](#none) [f](https://x.org) "
        "[g](../up.md)\n\n    [h](h.md)\n\n| [i](b.md#the-same-2) |\n|---|\n"
    )
    assert broken_links(page) == ["c.png", "#none", "../up.md", "b.md#the-same-2"]


def test_every_room_is_on_the_map():
    rooms = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for path in ROOT.glob("cae2pipe/*/__init__.py")
        if not path.parent.is_symlink()
    }
    rooms |= {"stages/", "configs/", "data_manifests/", "benchmarks/", "tests/", "docs/"}
    assert rooms - set(code_spans(CONTRIBUTING)) == set()


def test_what_the_contributing_page_points_at_is_defined():
    """``file.py::name`` names a function, a class or a constant of the file."""
    spans = [span.split("::") for span in code_spans(CONTRIBUTING) if "::" in span]
    assert spans
    for path, name in spans:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def |class )?{name}\b", text, re.MULTILINE), f"{path}::{name}"
