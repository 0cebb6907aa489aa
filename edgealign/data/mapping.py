"""`--map theirs=ours`: other people's column names to ours; dots reach inside, `theirs=-` hides a column."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.data.convert import known_columns
from edgealign.errors import InputError

HIDDEN = "-"


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """`["query=prompt", "meta.who=user_id", "label=-"]` to a dictionary; `-` hides the column.

    Raises:
        InputError: an entry that is not THEIRS=OURS, or a column of theirs named twice.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not equals or not theirs.strip() or not ours.strip():
            raise InputError(pair, "is not of the form THEIRS=OURS", "write for example --map query=prompt")
        if theirs.strip() in mapping:
            raise InputError(pair, f"maps {theirs.strip()} a second time", "map each column once")
        mapping[theirs.strip()] = ours.strip()
    return mapping


class ColumnMap:
    """Renames columns and remembers which names it never met."""

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self.mapping = dict(mapping)
        self.unmet = set(mapping)
        self.met: set[str] = set()
        known = known_columns()
        taken: set[str] = set()
        for theirs, ours in self.mapping.items():
            if ours != HIDDEN and ours not in known:
                close = difflib.get_close_matches(ours, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"ours are {', '.join(sorted(known))}"
                raise InputError(f"--map {theirs}={ours}", f"{ours} is not a column that edgealign knows", hint)
            if ours != HIDDEN and ours in taken:
                raise InputError(f"--map {theirs}={ours}", f"{ours} is filled twice", "map one column to each of ours")
            taken.add(ours)

    def apply(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row under our names; a null column counts as absent."""
        renamed = {name: value for name, value in row.items() if value is not None}
        self.met.update(renamed)
        if not self.mapping:
            return renamed
        found: dict[str, Any] = {}
        for theirs, ours in self.mapping.items():
            value = renamed[theirs] if theirs in renamed else _reach(renamed, theirs)
            if value is not None:
                found[ours] = value
                self.unmet.discard(theirs)
        for theirs in self.mapping:
            renamed.pop(theirs, None)
        found.pop(HIDDEN, None)
        return {**renamed, **found}

    def check(self, source: str | Path) -> None:
        """After some rows: a name that none of them had is a typing mistake.

        Raises:
            InputError: names the column and the ones that exist.
        """
        for theirs in sorted(self.unmet):
            raise InputError(
                source, f"--map {theirs}={self.mapping[theirs]}: no row has {theirs}",
                f"the columns are {', '.join(sorted(self.met))}",
            )


def _reach(row: Mapping[str, Any], path: str) -> Any:
    """`a.b.0` inside dictionaries and lists, or None."""
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
