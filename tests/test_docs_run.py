"""Every code block of the pages runs at a reduced size, or has a marker that says why not.

A marker is ``<!-- not run: REASON -->`` on the line before the block. Blocks run as written, those of a page one after
the other in a folder that holds what ``GIVEN`` names, with the presets that ``reduced`` returns.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from cae2pipe.commands.app import app
from cae2pipe.config import base
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from tests.conftest import write_photos
from tests.test_docs import PAGES, ROOT

MARKER = re.compile(r"<!-- not run: (\S.*\S) -->\s*")
RUN = ("bash", "python")
"""Languages of blocks that are run."""

GIVEN: dict[str, tuple[str, ...]] = {
    "README.md": ("photos",),
    "docs/quickstart.md": ("photos",),
    "docs/concepts.md": ("targets",),
    "docs/guides/data.md": ("imagenet",),
    "docs/guides/evaluating.md": ("imagenet", "runs/base"),
    "docs/guides/exporting.md": ("runs/base", "scores/base"),
    "docs/guides/extracting.md": ("shards",),
    "docs/guides/moving-and-sharing.md": ("targets",),
    "docs/guides/own-loop.md": ("clip", "dinov3"),
    "docs/guides/pretraining.md": ("targets",),
    "docs/guides/remote-and-many-machines.md": ("shards",),
    "docs/guides/views-and-cost.md": ("shards",),
    "docs/reference/format.md": ("targets",),
    "docs/reference/python.md": ("targets",),
}
"""What a page's blocks find in their folder."""


class Block(NamedTuple):
    """A block of code: its page, line and language, and the reason why it is not run, if there is one."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    """A page's blocks of bash and Python, except generated ones."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    for before, token in itertools.pairwise([*tokens[:1], *tokens]):
        marker = MARKER.fullmatch(before.content) if before.type == "html_block" else None
        if token.type == "fence" and token.info.strip() in RUN:
            assert token.map is not None
            name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
            yield Block(name, token.map[0] + 1, token.info.strip(), token.content, marker[1] if marker else None)


BLOCKS = [block for page in PAGES for block in blocks(page)]


TO_RUN = [block for block in BLOCKS if block.reason is None]


def reduced(extract: ExtractSettings, pretrain: PretrainSettings) -> dict[str, dict[str, Any]]:
    """What the presets that pages name are replaced by."""
    short = {"epochs": 1, "warmup_epochs": 0, "batch": 32, "speed": {"workers": 0, "device": "cpu"}}
    return {
        "shard/default": {"samples": 100, "speed": {"workers": 0}},
        "extract/clip-b16": extract.model_dump(mode="json", exclude_unset=True),
        **{f"pretrain/{name}": pretrain.model_dump(mode="json", exclude_unset=True) for name in ("base", "small")},
        "evaluate/knn": {"k": [20, 10], "speed": {"workers": 0, "device": "cpu"}},
        **{f"evaluate/{name}": short for name in ("linear", "attentive")},
        "evaluate/finetune-base": {**short, "chunk": 32, "draw": {"rand_augment": 0}},
    }


@pytest.fixture(scope="module")
def given(
    tmp_path_factory: pytest.TempPathFactory,
    extract_settings: Callable[..., ExtractSettings],
    pretrain_settings: Callable[..., PretrainSettings],
) -> Iterator[Path]:
    """A folder with what ``GIVEN`` names; while it exists, presets are reduced."""
    root = tmp_path_factory.mktemp("given")
    shutil.copytree(base.package_folder("configs"), root / "configs")
    for name, values in reduced(extract_settings(shard={"samples": 100}), pretrain_settings()).items():
        (root / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    write_photos(root / "photos" / "train", classes=3, each=12)
    write_photos(root / "photos" / "val", classes=3, each=4)
    (root / "imagenet").symlink_to("photos")
    (root / "clip").symlink_to("targets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "package_folder", lambda name: root / name)
        patch.chdir(root)
        run_bash(
            "cae2pipe shard photos/train shards\n"
            "cae2pipe extract-targets shards targets --config clip-b16\n"
            "cae2pipe extract-targets targets dinov3 --config clip-b16 --set teacher.project=false\n"
            "cae2pipe pretrain targets runs/base --config base\n"
            "cae2pipe evaluate knn runs/base photos scores/base\n",
            {},
        )
        yield root


def run_bash(code: str, more: dict[str, list[str]]) -> None:
    """Run the commands of a block, which must all be cae2pipe's, in this process.

    ``more``: what is added to commands with an option, by option.
    """
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "cae2pipe", f"cannot run here: {line}"
        words += [word for option in more if option in words for word in more[option]]
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"


def run_python(code: str) -> None:
    """Run a block as a script."""
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", list(dict.fromkeys(block.page for block in TO_RUN)))
def test_blocks_run(page, given, teacher_file, tmp_path, monkeypatch):
    for name in GIVEN.get(page, ()):
        shutil.copytree(given / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    # Target sets do not record the path of the teacher's weights.
    more = {"--live": ["--teacher-weights", str(teacher_file)]}
    for block in TO_RUN:
        if block.page == page and block.language == "bash":
            run_bash(block.code, more)
        elif block.page == page:
            run_python(block.code)


def test_a_marker_stands_before_a_block():
    for page in PAGES:
        markers = re.findall(r"^ *<!-- not run\b", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(markers) == sum(block.reason is not None for block in blocks(page)), page


def test_pages_that_are_given_something_exist():
    assert set(GIVEN) <= {page.relative_to(ROOT).as_posix() for page in PAGES}


def test_a_block_is_run_or_marked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n```bash\na\n```\n\n<!-- not run: no GPU -->\n```python\nb\n```\n\n- list\n\n  ```bash\n  c\n  ```\n"
        "\n```text\nd\n```\n\n<!-- not run: -->\n```bash\ne\n```\n"
    )
    found = [(block.line, block.language, block.code, block.reason) for block in blocks(page)]
    assert found == [
        (3, "bash", "a\n", None),
        (8, "python", "b\n", "no GPU"),
        (14, "bash", "c\n", None),
        (23, "bash", "e\n", None),
    ]
    with pytest.raises(AssertionError, match="cannot run here: pip install"):
        run_bash("pip install x", {})
    with pytest.raises(AssertionError, match="No such command"):
        run_bash("cae2pipe pretain targets runs/base", {})
