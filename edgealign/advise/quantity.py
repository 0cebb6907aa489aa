"""A number that says where it comes from, so that nothing is guessed silently."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MEASURED, PREDICTED, COMPUTED, BOUND, UNKNOWN = "measured", "predicted", "computed", "at best", "not measured"


@dataclass(frozen=True)
class Quantity:
    """`value` in the unit of its field; `source` is one of the words above, `how` its formula with its inputs.

    `at best` is a limit that no implementation beats: it can refute a wish, it cannot grant one.
    """

    value: float | None
    source: str
    how: str

    @property
    def known(self) -> bool:
        """Can it grant a wish?"""
        return self.value is not None and self.source != BOUND

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def unknown(how: str) -> Quantity:
    return Quantity(None, UNKNOWN, how)
