"""Names are data: any name of a file, class, run, folder or key appears on every page as plain text."""

from __future__ import annotations

import io
import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.commands import training
from cae2pipe.commands.shared import console
from cae2pipe.comparison.rows import Comparison, Row
from cae2pipe.errors import SourceError
from cae2pipe.reporting.box_pictures import box_sheet
from cae2pipe.reporting.comparison_page import comparison_html
from cae2pipe.reporting.comparison_text import comparison_markdown
from cae2pipe.reporting.confusion import NAMED, draw_confusion
from cae2pipe.reporting.gallery import Gallery, NeighbourRow
from cae2pipe.reporting.html import element, page
from cae2pipe.reporting.markdown import escaped, markdown_table
from cae2pipe.reporting.plots import Points, bars, curves, dots
from cae2pipe.runtime.foreign_names import told_apart, visible, visible_json
from cae2pipe.runtime.progress import Lines, Panel
from cae2pipe.runtime.terminal import Terminal, print_facts, print_table
from tests.reporting.test_html import read
from tests.reporting.test_plots import drawn  # noqa: F401 - a fixture

NASTY = [
    "[red]r", "[/]", "x[/y]z", "[lr=1e-3]", ":cat:", "a\x1b[2Jb", "bell\a", "c1\x9b2J", "x|y", "<b>", "<!-- x", "&lt;",
    "$a_b$", "$\\frac{$", "\\$", "_hidden", "_a_", "*a*", "`a`", "~~a~~", "[a](http://b.c)", "![a](b)", "https://b.c/d",
    "www.b.c", "# a", "- a", "1. a", "> a", "two\nlines", "cr\rx", "nel\x85x", "\u202egnp.exe", "\u2066x", "\ufeffx",
    "tab\tx", "\u2028x", "del\x7f", "%s %d", "{0}", "猫 café", "a\\b", "\udc80", "'\"", "a  b", "---", "=",
    "\u0bbe", "\u0301",
]  # fmt: skip
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cn"]), st.sampled_from("[]|<>$_*`~\\\x1b\u202e\n#-&!:.w")))
WORST = ["[red]r", "[/]", "[lr=1e-3]", ":cat:", "a\x1b[2Jb", "x|y", "<b>", "$a_b$", "two\nlines", "\u202egnp.exe"]


CLASSES = [name for name in WORST if "/" not in name]


def acts(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def harmless(text: str) -> bool:
    return not any(acts(char) and char != "\n" for char in text)


def with_examples(test):
    for name in NASTY:
        test = example(name)(test)
    return test


@with_examples
@given(TEXT)
def test_nothing_acts_and_what_can_be_seen_stays(name):
    shown = visible(name)
    assert not any(map(acts, shown))
    assert visible(shown) == shown
    assert shown == name or any(map(acts, name))
    assert json.loads(visible_json({name: [name]})) == {name: [name]}
    assert harmless(visible_json({name: [name]}))
    shown.encode("utf-8")


@given(st.lists(st.sampled_from(["a", "a (1)", "a (2)", "b", "a (1) (1)"]), max_size=8))
def test_names_that_repeat_are_told_apart(names):
    apart = told_apart(names, range(1, len(names) + 1))
    assert len(set(apart)) == len(names)
    assert all(new.startswith(old) for old, new in zip(names, apart, strict=True))
    if len(set(names)) == len(names):
        assert apart == names


def terminal() -> Terminal:
    return Terminal(file=io.StringIO(), width=10_000, color_system=None)


@with_examples
@example("\U0001f3fb")  # a skin tone alone, whose width is 0
@given(TEXT)
def test_terminals_show_names(name):
    console = terminal()
    console.say(f"a {name} b")
    print_table(console, [{name: name, "other": name}])
    console.problem(SourceError(f"what {name} is", where=name, fix=f"{name}!"), "error:")
    text = console.file.getvalue()
    assert harmless(text)
    shown = visible(name)
    first, head, row, *error = text.split("\n")
    assert first == f"a {shown} b"
    assert head.split() == [*shown.split(), "other"]
    assert row.split() == shown.split() * 2
    assert [line for line in error if line.startswith(("error:", "  where:", "  fix:"))] == [
        f"error: what {name} is".replace("\n", "\\n") if "\n" not in name else error[0],
        *([f"  where: {shown}"] if name else []),
        f"  fix:   {shown}!",
    ] or any(map(acts, name))


@with_examples
@given(TEXT)
def test_facts_and_logs_show_names(name):
    console = terminal()
    print_facts(console, {"name": name, "list": [name]})
    file = io.StringIO()
    Lines("job", file).log(f"a {name} b")
    panel = Panel(f"job {name}", console)
    panel.total(3, name)
    panel.advance(1, **{name: 1.0})
    panel.log(f"a {name} b")
    panel.waits_for(name)
    console.print(panel.render())
    assert harmless(console.file.getvalue() + file.getvalue())
    assert file.getvalue() == f"job: a {visible(name)} b\n"
    assert f"job {visible(name)}: a {visible(name)} b\n" in console.file.getvalue()


MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def cell_text(source: str) -> list[str]:
    """The text of cells, headings and paragraphs; fails if they contain anything but text."""
    texts = []
    for token in MARKDOWN.parse(source):
        assert token.type not in ("html_block", "code_block", "fence", "hr", "blockquote_open")
        if token.type == "inline":
            assert {child.type for child in token.children} <= {"text"}, token.children
            texts.append("".join(child.content for child in token.children))
    return texts


@with_examples
@given(TEXT)
def test_markdown_shows_names(name):
    shown = visible(name).strip()
    (paragraph,) = cell_text(escaped(name.strip())) or [""]
    assert paragraph == visible(name.strip()).strip()
    assert cell_text("\n".join(markdown_table(["a", name], [[name, "b"]]))) == ["a", shown, shown, "b"]


@pytest.mark.parametrize("name", ["https://b.c", "HTTP://b.c", "www.b.c", "see ftp://b.c"])
def test_markdown_makes_no_links_by_itself(name):
    """GitHub's Markdown does so for a scheme with a colon and for www with a dot."""
    assert not re.search(r"(?i)[a-z]://|www\.", escaped(name))
    assert cell_text(escaped(name)) == [name]


@with_examples
@given(TEXT)
def test_pages_show_names(name):
    document = read(page(name, element("p", name, title=name)).replace("\n", ""))
    assert harmless(document.text)
    shown = visible(name, keep="\n").replace("\n", "")
    assert ("p", {"title": shown}) in document.tags
    assert not {tag for tag, _ in document.tags} - {"html", "head", "meta", "title", "style", "body", "main", "p"}


def test_plots_and_pictures_show_names(drawn):  # noqa: F811
    names = [*WORST, "$\\frac{$", "\\$", "_hidden", "猫 café"]
    curves(
        {name: Points([1], [1]) for name in names}, x_label="$a_c$", y_label="$\\sqrt{$", levels={"$x$": 1.0, "$": 2.0}
    )
    axes = drawn()[0]
    seen = [*axes.figure.legends[0].get_texts(), axes.xaxis.label, axes.yaxis.label]
    dots({name: [1.0] for name in names}, x_label="$")
    bars([(name, 1.0, name) for name in names], strong=0, x_label="$a$")
    axes = drawn()[0]
    seen += [*axes.get_yticklabels(), *axes.texts, axes.xaxis.label]
    texts = [text._preprocess_math(text.get_text()) for text in seen]
    assert not any(formula for _, formula in texts)
    shown = [" ".join(text.split()) for text, _ in texts]
    for name in names:
        assert shown.count(" ".join(visible(name).split())) == 3
    assert {"$a_c$", "$\\sqrt{$", "$x$", "$", "$a$"} <= set(shown)

    count = len(NASTY)
    draw_confusion(np.eye(count, dtype=np.int64)[:NAMED, :NAMED], NASTY[:NAMED])
    boxes = np.zeros((count, 4), np.float32), np.arange(count) + 1
    box_sheet([(np.zeros((8, 8, 3), np.uint8), boxes, boxes)], NASTY)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rows = [
        Row(name, {"knn": [0.5]}, {"knn": 50.0 + n}, curves={"loss": [2.0, 1.0]}, features={"knn": name})
        for n, name in enumerate(WORST)
    ]
    for row in rows:
        row.unfinished.append((Path("runs") / row.name.replace("/", ""), "unfinished"))
    protocols = {"knn": " ".join(WORST)}
    return Comparison("# <b>|", "- $a$ [x](y)", ["knn"], rows, protocols, 9, failed=WORST)


def test_reports_show_names(comparison, monkeypatch):
    console = terminal()
    monkeypatch.setattr(training, "console", console)
    training.print_comparison(comparison, Path("a\x1b[2Jb"))
    text = comparison_markdown(comparison)
    views = [np.zeros((8, 8, 3), np.uint8)] * 2
    neighbours = [NeighbourRow(name, [[1]]) for name in WORST]
    html = comparison_html(comparison, Gallery(views=views, queries=[0], neighbours=neighbours, left_out=WORST))
    assert harmless(console.file.getvalue() + text + html)
    shown, cells = read(html), cell_text(text)
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"b", "script", "a"}
    for name in WORST:
        assert visible(name) in console.file.getvalue()
        assert visible(name, keep="\n") in shown.text
        assert cells.count(visible(name)) == 2
    assert cells[:2] == ["# <b>|", "- $a$ [x](y)"]


@pytest.fixture(scope="module")
def nasty_data(tmp_path_factory) -> Path:
    """Two images for train and one for val of every class."""
    root = tmp_path_factory.mktemp("nasty") / "[/]\x1b[2J\u202e data"
    rng = np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 1)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"[red]{number}.png")
    return root


def test_commands_show_names(nasty_data, exported, tmp_path, monkeypatch):
    # A console reads COLUMNS once, when it is created, as under pytest-xdist.
    monkeypatch.setattr(console, "_width", 1000)
    out = tmp_path / "[lr=1e-3]\x1b[31m"
    out.mkdir()
    encoder = out / "[red]<b>|enc\x1b[2J"
    shutil.copytree(exported, encoder)

    def run(*words: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code, done.output
        assert harmless(done.stdout + done.stderr)
        return done.stdout + done.stderr

    knn = ("--set", "k=2", "--set", "features.image_size=32", "--workers", 0, "--device", "cpu")
    assert "[red]<b>|enc\\x1b[2J" in run("evaluate", "knn", encoder, nasty_data, out / "x[/y]", *knn)
    shown = visible(str(out / "x[/y]" / "knn"))
    assert shown in run("results", out)
    assert cell_text(run("results", out, "--format", "markdown"))[10:13] == ["[red]<b>|enc\\x1b[2J", "knn", "class"]
    (row,) = json.loads(run("results", out, "--format", "json"))
    assert row["encoder"] == encoder.name
    assert shown in run("verify", out / "x[/y]" / "knn")
    assert yaml.safe_load(run("inspect", out / "x[/y]" / "knn"))["kind"] == "scores"
    assert json.loads(run("inspect", "--json", out / "x[/y]" / "knn"))["path"] == str(out / "x[/y]" / "knn")
    result = json.loads((out / "x[/y]" / "knn" / "result.json").read_text())
    assert set(result["per_class"]) == set(CLASSES)

    run("shard", nasty_data / "val", out / "[/]shards", "--workers", 0)
    tar = next((out / "[/]shards" / "tars").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    assert visible(str(tar)) in run("verify", out / "[/]shards", code=1)
    assert visible(str(out / "[/]nowhere")) in run("inspect", out / "[/]nowhere", code=2)
    bad = out / "[/]\x1b[2J.yaml"
    bad.write_text("epochs: [\x1b\n  fix: rm -rf")
    run("config", "show", "pretrain", bad, code=2)
    bad.write_text("epochs: 3\n'[/]\\e[2J': 1\n")
    run("config", "show", "pretrain", bad, code=2)
    run("config", "list")
    run("[/]\x1b[2J", code=2)
