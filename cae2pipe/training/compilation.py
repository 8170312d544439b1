"""torch.compile: reset for every run, and advice if its compiler fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cae2pipe.errors import CompileError


def compiles(setting: bool | None, device: torch.device) -> bool:
    """Whether to compile; None: on CUDA only."""
    return device.type == "cuda" if setting is None else setting


def compile_in_place(modules: Iterable[nn.Module], backend: Any = "inductor") -> None:
    """Compile the calls of modules, with fixed shapes.

    Graphs of earlier runs in this process are discarded first. All runs share one code object, for which torch keeps
    eight graphs and runs everything beyond eagerly. Inductor's cache on disk makes recompiling cheap.
    """
    torch.compiler.reset()
    for module in modules:
        module.compile(backend=backend, dynamic=False)


@contextmanager
def compiler_advice(setting: str = "speed.compile") -> Iterator[None]:
    """Around a first call: a failure of the compiler becomes an error that says how to run without it.

    Raises:
        CompileError: with the last line of the compiler's output. torch.OutOfMemoryError: memory ran out meanwhile.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        inner: BaseException = error.inner_exception
        if isinstance(inner, torch.OutOfMemoryError):
            raise inner from None
        said = next((line.strip() for line in reversed(str(inner).splitlines()) if line.strip()), "")
        raise CompileError(
            f"torch.compile failed: {type(inner).__name__}: {said[:300]}",
            where=setting,
            fix=f"run without it: --set {setting}=false; or install a C compiler and Python's headers (python3-dev)",
        ) from None
