"""Plain technical English: phrases that a US or EU engineer would not write, and what to write instead.

Comments, docstrings and other texts of Python files are checked, and Markdown and YAML as a whole.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_YET: tuple[str, ...] = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/",
    "cae2pipe/comparison/",
    "cae2pipe/demo/",
    "cae2pipe/dense/",
    "cae2pipe/evaluation/",
    "cae2pipe/loading/",
    "cae2pipe/methods/",
    "cae2pipe/models/",
    "cae2pipe/reporting/",
    "cae2pipe/supervised/",
    "cae2pipe/targets/",
    "cae2pipe/training/",
    "stages/",
    "tests/",
)
"""Beginnings of the paths that are not checked yet."""

UNITS = "bytes|views|images|epochs|samples|tokens|pixels|rows|requests|operations|floats|values|figures|masks|regions"
EACH = (
    "name|line|class|tar|row|scale|synset|path|label|listing|file|figure|score|seed|step|view|image|token|sample|"
    "shard|core|process|machine|variant|epoch|block|message|request|second|minute"
)
THINGS = "tar|file|number|table|label|image|part|unit|run|text|path|command|manifest|archive"
PHRASES = [
    (r"hang(?:s|ing)? on\b", "the order hangs on the seed", "the order depends on the seed"),
    (
        r"(?:going|go|goes|gone|went) on (?:from|with|where|making|to the same)\b",
        "it goes on from step 5",
        "it resumes from step 5",
    ),
    (
        r"\b(?:the same command|a run|the run|training) goes on\b",
        "the same command goes on",
        "rerun the same command to resume",
    ),
    (r"\bmend(?:s|ed|ing)?\b", "mend that", "fix the permissions, correct the line, repair the file"),
    (
        r"\b(?:leave|leaves|left|leaving) (?:it|them|that|this|(?:the|a) [\w.-]+|--?[\w-]+) away\b",
        "leave it away",
        "omit it",
    ),
    (r"\bcan(?:not)? be had\b|\bto be had\b", "the weights cannot be had", "the weights cannot be loaded"),
    (rf"\b(?:{UNITS}) an? (?:{EACH})\b", "bytes a view", "bytes per view"),
    (rf"\b(?:one|an?) (?:{EACH}) an? (?:{EACH})\b", "a name a line", "one name per line"),
    (r"\bof one's own\b", "a method of one's own", "your own method"),
    (r"\bas it were\b", "a cache, as it were", "a cache"),
    (r"\b(?:come|comes|came) to the same\b", "both come to the same", "both are equivalent"),
    (r"\b(?:come|comes|came) out (?:otherwise|as it was|the same)\b", "the tar comes out otherwise", "the tar differs"),
    (r"\bfor good(?=\s*(?:[.,;:)]|$))", "it is kept for good", "it is kept permanently"),
    (r"\bat hand\b", "the weights are at hand", "the weights are cached"),
    (r"\b(?:to be fetched|be fetched)\b", "to be fetched", "not cached"),
    (r"\bpassed over\b", "files that are passed over", "files that are skipped"),
    (
        r"\b(?:tell|tells|told|telling) [\w ]*\bapart\b",
        "images are told apart by key",
        "images are distinguished by key",
    ),
    (r"(?<![\w`-])beside (?=\w)", "labels beside the tars", "labels next to the tars; with, besides, in addition to"),
    (r"\bwhere (?:\w+ )?\w+ lies?\b", "where files lie", "where files are"),
    (r"\banew\b", "pack the files anew", "pack the files again"),
    (r"\basked to leave\b", "it was asked to leave", "it was stopped by SIGUSR1"),
    (
        r"\bis to make, or to go on with\b|\bto make, or to\b",
        "the folder to make, or to fill",
        "output folder (created, or resumed if it exists)",
    ),
    (r"\b(?:laid|lay|lays) (?:over|on top)\b", "settings laid over the preset", "settings that override the preset"),
    (r"\bleaves nothing of\b", "10 leaves nothing of 3 epochs", "10 must be less than 3"),
    (r"\b(?:broken|broke|breaks?) off\b", "a run that was broken off", "a run that was interrupted"),
    (r"\bcan be told\b(?! apart)", "all that a command can be told", "all settings of a command"),
    (r"\bmeans nothing to\b", "the option means nothing to timm", "the option does not apply to timm"),
    (
        rf"(?<!there )\b(?:is|are) no (?:{THINGS})s?\b",
        "this is no tar",
        "this is not a tar",
    ),
    (r"\b(?:under way|underway)\b", "items under way to the device", "items in transit to the device"),
    (r"\bevery so many\b", "a checkpoint every so many epochs", "a checkpoint every N epochs"),
    (r"\bheed(?:s|ed|ing)?\b", "a signal is heeded", "a signal takes effect"),
    (r"\bse(?:es|en|e|eing) to (?:it|that|this)\b", "see to that", "fix the permissions, free some space"),
    (r"\bbear(?:s|ing)? (?:an?|the|its|no|their) ", "files that bear the name", "files that have the name"),
    (r"\bof ours\b", "a manifest of ours", "a manifest of cae2pipe"),
    (r"\bfor ever\b", "it waits for ever", "it waits forever"),
    (r"\b(?:goes?|going|gone|went) through again\b", "a step is gone through again", "a step is replayed"),
    (r"\bso[- ]manieth\b", "every so-manieth item", "every N-th item"),
    (r"\bin all(?=\s*(?:[.,;:)]|$))", "ten views in all", "ten views in total"),
]
"""A regular expression, in lower case; a text that it finds; and what to write instead."""
FOUND = re.compile("|".join(f"(?P<p{number}>{pattern})" for number, (pattern, *_) in enumerate(PHRASES)), re.IGNORECASE)


def files(root: Path = ROOT) -> list[Path]:
    """The files that are checked. ``cae2pipe/stages`` and others of that kind are links."""
    named = [path for kind in ("py", "md", "yaml", "yml", "toml") for path in root.glob(f"*.{kind}")]
    for folder in (".ci", ".github", "benchmarks", "cae2pipe", "configs", "docs", "stages", "tests"):
        named += [path for path in (root / folder).rglob("*") if path.suffix in (".py", ".md", ".yaml", ".yml", "")]
    return sorted({path.resolve() for path in named if path.is_file()} - {Path(__file__).resolve()})


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Comments with their lines; those of consecutive lines are one."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    for _, block in groupby(enumerate(tokens), key=lambda pair: pair[1].start[0] - pair[0]):
        lines = [token for _, token in block]
        yield lines[0].start[0], " ".join(line.string.lstrip("# ") for line in lines)


def strings(text: str) -> Iterator[tuple[int, str]]:
    """Texts with their lines: docstrings, messages; what an f-string fills in is ``{}``."""
    tree = ast.parse(text)
    filled = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inner = {id(value) for node in filled for value in node.values}
    for node in filled:
        yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def wrong(path: Path) -> list[str]:
    """The phrases of a file, with their lines and what to write instead."""
    text = path.read_text(encoding="utf-8")
    pieces = [*comments(text), *strings(text)] if path.suffix == ".py" else [(1, text)]
    lines = []
    for line, piece in sorted(pieces):
        # Phrases do not span paragraphs.
        plain = re.sub(r"[^\S\n]*\n[^\S\n]*(?:# )?", "\n", piece)
        for match in FOUND.finditer(re.sub(r"(?<!\n)\n(?!\n)", " ", plain)):
            instead = PHRASES[int(str(match.lastgroup)[1:])][2]
            lines.append(
                f"{path.name}:{line + plain[: match.start()].count(chr(10))}: {match[0]!r}: write e.g. {instead!r}"
            )
    return lines


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_phrases(path):
    if not path.relative_to(ROOT).as_posix().startswith(NOT_YET):
        assert wrong(path) == []


@pytest.mark.parametrize(("pattern", "example", "instead"), PHRASES, ids=[example for _, example, _ in PHRASES])
def test_every_phrase_is_found_and_its_replacement_is_not(pattern, example, instead):
    assert re.search(pattern, example)
    assert not FOUND.search(instead)


def test_phrases_are_found_wherever_they_are(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""All hangs\non it."""\n\n# Bytes a\n# view.\nmend = f"{1} mend" "ed {2}"\nfix = f"leave the {3} away"\n'
        'good = "goes on, on one machine; a second; amended; there is no tar"\n'
    )
    assert [line.split(":")[1] for line in wrong(path)] == ["1", "4", "6"]
    path = tmp_path / "a.md"
    path.write_text("# Title\n\nIt hangs\non what\n")
    assert wrong(path) == ["a.md:3: 'hangs on': write e.g. 'the order depends on the seed'"]
