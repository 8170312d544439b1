"""Target sets: views and the teacher's latents, compressed, on disk.

``from cae2pipe.targets import TargetSet``; ``TargetSet(path)[0].tokens`` is a (T, D) array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cae2pipe.targets.target_set import Target, TargetSet

__all__ = ["Target", "TargetSet"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds to import, and other modules of this package do not need it.
    if name in __all__:
        from cae2pipe.targets import target_set

        return getattr(target_set, name)
    raise AttributeError(name)
