"""Numbers in words."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 store``, ``1,024 stores``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def singular(unit: str) -> str:
    """One of a unit of work: ``batch`` of ``batches``."""
    return unit.removesuffix("es") if unit.endswith(("ches", "sses")) else unit.removesuffix("s")
