"""An objective's numbers beside beta: where each may lie, and how given ones take the defaults' places.

    configure(find("lfm2"), ["f=hinge", "gamma=0.3"])      # as --settings gives them: the objective, and its numbers
    read_settings(find("cdpo"), {"epsilon": 0.2})           # all of an objective's numbers, checked

Importing this module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgealign.errors import RecipeError
from edgealign.registry import suggest

if TYPE_CHECKING:
    from edgealign.objectives.table import Objective

PARTS = {"f": "pair_term", "delta": "absolute"}  # settings that name a part


@dataclass(frozen=True)
class Setting:
    """A number of an objective: its default, and the range that it makes sense in."""

    default: float
    low: float = 0.0
    high: float = math.inf
    ends: str = "[]"  # a round bracket where an end itself makes no sense

    def allows(self, value: float) -> bool:
        """Is it finite and in the range?"""
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return math.isfinite(value) and above and below

    @property
    def range(self) -> str:
        """'from 0 and below 0.5'."""
        words = f"{'above' if self.ends[0] == '(' else 'from'} {self.low:.3g}"
        if math.isinf(self.high):
            return words
        return f"{words} and {'below' if self.ends[1] == ')' else 'at most'} {self.high:.3g}"


def settings_of(objective: Objective) -> dict[str, Setting]:
    """All numbers that can be given: `omega` of the relative part, the objective's own, the absolute terms' weights."""
    weights = {f"weight_{name}": Setting(value) for name, value in objective.absolute}
    relative = {"omega": Setting(1.0)} if objective.pair_term or objective.contrast else {}
    return {**relative, **objective.settings, **weights}


def configure(objective: Objective, items: Sequence[str]) -> tuple[Objective, dict[str, float]]:
    """What `["f=hinge", "gamma=0.3"]` makes of an objective, and the given numbers by name.

    Raises:
        RecipeError: an item that is not NAME=NUMBER, a part that the objective does not offer, or a number that it
            does not have or that is out of its range.
    """
    numbers: dict[str, float] = {}
    for item in items:
        name, _, value = (part.strip() for part in item.partition("="))
        if name in objective.parts:
            objective = _with_part(objective, name, value)
            continue
        try:
            numbers[name] = float(value)
        except ValueError as error:
            raise RecipeError(item, "is not NAME=NUMBER", "write for example --settings gamma=0.3") from error
    read_settings(objective, numbers)
    return objective, numbers


def read_settings(objective: Objective, given: Mapping[str, float] | None) -> dict[str, float]:
    """The objective's numbers with the given ones in their places, and `omega` and the absolute terms' weights.

    Raises:
        RecipeError: a number that the objective does not have, or one outside of where it makes sense.
    """
    known = settings_of(objective)
    found = {"omega": 1.0, **{name: setting.default for name, setting in known.items()}}
    for name, value in (given or {}).items():
        if name not in known:
            own = ", ".join(sorted([*known, *objective.parts])) or "none"
            raise RecipeError(name, f"is no setting of {objective.key}{suggest(name, known)}", f"its settings: {own}")
        if not known[name].allows(float(value)):
            reason = f"{objective.key} takes a number {known[name].range}"
            raise RecipeError(f"{name} {value:g}", reason, f"its default is {known[name].default:g}")
        found[name] = float(value)
    if found.get("most", math.inf) < found.get("least", 0.0):
        raise RecipeError(f"most {found['most']:g}", f"is below least {found['least']:g}", "give most the larger one")
    return found


def _with_part(objective: Objective, name: str, value: str) -> Objective:
    offered = objective.parts[name]
    if value not in offered:
        reason = f"is none of what {objective.key} offers{suggest(value, offered)}"
        raise RecipeError(f"{name}={value}", reason, f"choose one of: {', '.join(offered)}")
    if PARTS[name] == "pair_term":
        return replace(objective, pair_term=value)
    ((_, weight),) = objective.absolute
    return replace(objective, absolute=((value, weight),))
