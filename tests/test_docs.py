"""The Markdown files of the repository: links, names and figures exist, and commands can be parsed."""

import functools
import importlib.util
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

import cae2pipe
from cae2pipe.commands.app import app
from cae2pipe.config.base import load
from cae2pipe.config.stages import settings_class
from tests.test_language import strings

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
SITE = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
EXTENDING = ROOT / "docs" / "extending.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
STAGES = {"shard": "shard", "extract-targets": "extract", "pretrain": "pretrain", "compare": "compare"}
"""Commands that take the settings of one stage."""
NAMES_PATH = re.compile(
    r"(?:\.ci|\.github|benchmarks|cae2pipe|configs|data_manifests|docs|stages|tests)(?:/[\w.*-]+)+/?"
)
"""Code spans that count as paths of the repository."""


@functools.cache
def hook() -> ModuleType:
    """The hook that fills the generated pages when mkdocs builds the site."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "hooks" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def parsed(page: Path) -> list[Token]:
    """A page's tokens, including generated content."""
    text = hook().on_page_markdown(page.read_text(encoding="utf-8"))
    return MarkdownIt("commonmark").enable("table").parse(text)


@functools.cache
def inline(page: Path) -> list[list[Token]]:
    """The inline tokens of each paragraph, heading and table cell, without code blocks."""
    return [token.children or [] for token in parsed(page) if token.type == "inline"]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code in a language."""
    return [token.content for token in parsed(page) if token.type == "fence" and token.info.strip() == language]


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings on GitHub and on the site."""
    tokens = parsed(page)
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
    """Relative links of a page to missing files or headings."""
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


@pytest.mark.parametrize("page", [CONTRIBUTING, EXTENDING], ids=lambda page: page.name)
def test_what_a_page_points_at_is_defined(page):
    """``file.py::name`` names a function, a class or a constant of the file."""
    spans = [span.split("::") for span in code_spans(page) if "::" in span]
    assert spans
    for path, name in spans:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def |class )?{name}\b", text, re.MULTILINE), f"{path}::{name}"


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of a shell block that run cae2pipe, and their arguments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "cae2pipe" in words and words[0] != "pip":
            words = words[words.index("cae2pipe") + 1 :]
            yield line, list(itertools.takewhile(lambda word: word not in ("|", "||", "&&", ">", ";"), words))


def parse(words: list[str]) -> None:
    """Parse a command line and its settings without running it. Raises the errors in it."""
    command: Any = typer.main.get_command(app)
    path = []
    while hasattr(command, "commands"):
        path.append(words[len(path)])
        command = command.commands[path[-1]]
    given = command.make_context(path[-1], words[len(path) :]).params
    stage = given["stage"] if path == ["config", "show"] else STAGES.get(path[0], path[0])
    preset = next((given[name] for name in ("preset", "grid", "config") if name in given), None)
    if preset and not preset.endswith(".yaml"):
        values = {"targets": "online"} if given.get("online") else {}
        load(settings_class(stage, preset), stage, preset, overrides=given.get("set_") or [], values=values)


def wrong_commands(page: Path) -> list[str]:
    """The commands of a page that cae2pipe would refuse, with the reason."""
    wrong = []
    for line, words in itertools.chain.from_iterable(map(commands, blocks(page, "bash"))):
        try:
            parse(words)
        except Exception as error:
            wrong.append(f"{line.strip()}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_can_be_parsed(page):
    assert wrong_commands(page) == []


def test_the_help_of_every_command_ends_with_an_example_that_can_be_parsed():
    for path, command in hook().commands(typer.main.get_command(app)):
        for line in (command.epilog or "").split("\n\n"):
            words = shlex.split(line.removeprefix("Example: "))
            assert words[: len(path)] == list(path)
            parse(words[1:])


def test_commands_are_found():
    assert sum(len(list(commands(block))) for page in PAGES for block in blocks(page, "bash")) > 40


@pytest.mark.parametrize(
    "line",
    [
        "cae2pipe pretrain targets runs/base --epohs 3",
        "cae2pipe pretain targets runs/base",
        "cae2pipe pretrain targets",
        "cae2pipe pretrain targets runs/base --config bsae",
        "cae2pipe evaluate finetune runs/base images scores --set layer_decai=0.8",
        "torchrun --nproc-per-node 8 \\\n    -m cae2pipe pretrain targets runs --set data.streams=some  # a comment",
    ],
)
def test_a_wrong_command_is_found(tmp_path, line):
    page = tmp_path / "page.md"
    page.write_text(f"```bash\ncae2pipe pretrain targets runs/base --epochs 3\n{line}\n```\n")
    assert len(wrong_commands(page)) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_settings_files_load(page, tmp_path):
    for block in blocks(page, "yaml"):
        stage = "compare" if "variants:" in block else "extract" if "teacher:" in block else "pretrain"
        (tmp_path / "block.yaml").write_text(block)
        load(settings_class(stage, ""), stage, str(tmp_path / "block.yaml"))


def quoted_messages(page: Path) -> list[str]:
    """What a page says that cae2pipe prints: the first lines of errors in blocks, and text in double quotes."""
    messages = re.findall(r"^error: (.*)$", "\n".join(blocks(page, "text")), re.MULTILINE)
    for line in inline(page):
        messages += re.findall(r'"(.+?)"', "".join(token.content for token in line if token.type == "text"))
    return messages


def constant_parts(message: str) -> list[str]:
    """The words of a message between its placeholders: words with a digit or a dot inside count as such."""
    parts = re.split(r"[^ ]*(?:\d|\w\.\w)[^ ]*", message)
    return [part.strip(" :") for part in parts if " " in part.strip(" :")]


def test_messages_that_a_page_quotes_are_ones():
    paths = [*(ROOT / "stages").rglob("*.py"), *(ROOT / "cae2pipe").rglob("*.py")]
    texts = "\n".join(text for path in paths for _, text in strings(path.read_text(encoding="utf-8"))).lower()
    messages = quoted_messages(TROUBLESHOOTING)
    assert len(messages) > 6
    assert all(map(constant_parts, messages))
    assert [part for message in messages for part in constant_parts(message) if part.lower() not in texts] == []


@pytest.mark.parametrize("page", SITE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_page_links_on(page):
    ends = [token.attrs.get("href") for line in inline(page)[-6:] for token in line if token.type == "link_open"]
    assert any(str(target).partition("#")[0].endswith(".md") for target in ends)


def test_generated_pages_are_whole():
    names = {" ".join(path[1:]) for path, _ in hook().commands(typer.main.get_command(app))}
    pages = [ROOT / "docs" / "reference" / name for name in ("cli.md", "settings.md")]
    assert {name.replace(" ", "-") for name in names} <= anchors(pages[0])
    headings = {"shard", "extract-presets", "pretrain-optimizer", "evaluate-knn", "evaluate-detect-speed", "compare"}
    assert headings <= anchors(pages[1])
    spans = set(code_spans(pages[1]))
    assert {"optimizer.lr", "codec.fidelity", "0.97", "speed.workers", "recipe=official"} <= spans


def test_the_python_page_documents_every_public_name():
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    public = (getattr(cae2pipe, name) for name in cae2pipe.__all__ if name != "__version__")
    documented = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert {f"{thing.__module__}.{thing.__name__}" for thing in public} <= set(documented)
    assert len(set(documented)) == len(documented)
