"""This process among those that torchrun started."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cae2pipe.errors import SettingsError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started: ``rank`` of ``ranks``, ``local`` of ``on_machine`` here."""

    rank: int = 0
    ranks: int = 1
    local: int = 0
    on_machine: int = 1


def torchrun_rank() -> Rank:
    """From the variables that torchrun sets; a single process if one of them is missing.

    Raises:
        SettingsError: one is not a number, or they contradict each other.
    """
    if any(name not in os.environ for name in TORCHRUN):
        return Rank()
    values = {name: os.environ[name] for name in TORCHRUN}
    for name, value in values.items():
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise _not_torchruns(f"{name}={value!r} is not a number")
    numbers = {name: int(value) for name, value in values.items()}
    for below, above in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[below] >= numbers[above]:
            raise _not_torchruns(f"{below}={numbers[below]} is not below {above}={numbers[above]}")
    if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
        raise _not_torchruns(f"LOCAL_WORLD_SIZE={values['LOCAL_WORLD_SIZE']} is more than WORLD_SIZE")
    return Rank(*numbers.values())


def _not_torchruns(what: str) -> SettingsError:
    return SettingsError(
        what,
        where="environment",
        fix="start with torchrun, which sets these variables; or `unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE` "
        "for a single process",
    )
