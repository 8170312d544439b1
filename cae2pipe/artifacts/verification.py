"""What the check of a folder against its manifest came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cae2pipe.errors import Cae2pipeError


@dataclass
class Verification:
    """The outcome of ``verify``: ``problems`` of this folder, the units (``bad``) they are in, and the outcome of the
    shard set inside, if there is one."""

    path: Path
    kind: str
    files: int
    own: list[Cae2pipeError] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    inner: list[Verification] = field(default_factory=list)

    @property
    def problems(self) -> list[Cae2pipeError]:
        return self.own + [problem for inner in self.inner for problem in inner.problems]

    def summary(self) -> str:
        files = self.files + sum(inner.files for inner in self.inner)
        if self.problems:
            return f"{self.path}: {len(self.problems)} problems in {files} files of this {self.kind} folder"
        return f"{self.path}: all {files} files of this {self.kind} folder are as the manifest says"
