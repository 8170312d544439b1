"""The units of a folder by name, kept as text until they are asked for.

A target set of 13 million images in four views has 64,000 units, whose parsed files and digests take 700 MB. Their text
takes 150 MB, and a unit is parsed in some microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, MutableMapping
from typing import Any, Generic, cast

from pydantic_core import from_json

from cae2pipe.artifacts.manifest_kinds import UnitT


class Units(MutableMapping[str, UnitT], Generic[UnitT]):
    """Units by name.

    Args:
        units: each parsed, or its JSON text, which must have been validated. Text is parsed at every access, so
            changing what an access returns changes nothing here: assign the changed unit.
        samples: of the units that are text, as far as they have any.
    """

    def __init__(
        self,
        units: Mapping[str, UnitT | memoryview | bytes] | None = None,
        samples: Mapping[str, int] | None = None,
    ):
        self._units: dict[str, UnitT | memoryview | bytes] = dict(units or {})
        self._samples = dict(samples or {})

    @classmethod
    def of(cls, units: Mapping[str, UnitT]) -> Units[UnitT]:
        """These units, as they are if they are ``Units``."""
        return units if isinstance(units, Units) else cls(units)

    def __getitem__(self, name: str) -> UnitT:
        unit = self._units[name]
        return cast(UnitT, unit if isinstance(unit, dict) else from_json(bytes(cast(memoryview, unit))))

    def __setitem__(self, name: str, unit: UnitT) -> None:
        self._units[name] = unit
        self._samples.pop(name, None)

    def __delitem__(self, name: str) -> None:
        del self._units[name]
        self._samples.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def __contains__(self, name: object) -> bool:
        return name in self._units

    def __repr__(self) -> str:
        return f"Units({', '.join(self._units)})"

    def __getstate__(self) -> dict[str, Any]:
        units = {name: bytes(unit) if isinstance(unit, memoryview) else unit for name, unit in self._units.items()}
        return {"_units": units, "_samples": self._samples}

    def keys(self) -> KeysView[str]:
        return self._units.keys()

    def kept(self, name: str) -> UnitT | memoryview | bytes:
        """A unit as it is kept: parsed, or its text."""
        return self._units[name]

    def samples(self, name: str) -> int:
        """Samples of a unit that has some; without parsing it."""
        if name in self._samples:
            return self._samples[name]
        return int(cast(Mapping[str, Any], self[name])["samples"])

    def merged(self, others: Units[UnitT]) -> Units[UnitT]:
        """These units and ``others``, which replace those of the same name."""
        own = {name: samples for name, samples in self._samples.items() if name not in others}
        return Units({**self._units, **others._units}, {**own, **others._samples})
