"""The result of checking a folder against its manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cae2pipe.errors import Cae2pipeError
from cae2pipe.runtime.wording import counted


@dataclass
class Verification:
    """The result of ``verify``: ``problems`` of this folder, the units (``bad``) that they are in, and the result for
    the shard set inside, if there is one, and the sets of added teachers. ``pixels``: the folder with the pixels of a
    set by reference."""

    path: Path
    kind: str
    files: int
    own: list[Cae2pipeError] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    inner: list[Verification] = field(default_factory=list)
    pixels: Path | None = None

    @property
    def problems(self) -> list[Cae2pipeError]:
        return self.own + [problem for inner in self.inner for problem in inner.problems]

    def summary(self) -> str:
        files = self.files + sum(inner.files for inner in self.inner)
        if self.problems:
            problems = counted(len(self.problems), "problem")
            return f"{self.path}: {problems} in {counted(files, 'file')} of this {self.kind} folder"
        return f"{self.path}: {counted(files, 'file')} of this {self.kind} folder checked, all match the manifest"
