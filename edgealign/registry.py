"""Tables of parts by name: a name maps to "module:attribute" and is imported when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from edgealign.errors import RecipeError


def suggest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest known name, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


class Registry:
    """A named table whose values are imported on first use.

    Args:
        kind: what the entries are, in the singular, for messages ("runtime").
        table: name to "package.module:attribute".
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self.table = dict(table)

    def names(self) -> tuple[str, ...]:
        """All names, in the table's order."""
        return tuple(self.table)

    def load(self, name: str) -> Any:
        """Import and return the entry.

        Raises:
            RecipeError: the name is not in the table; the closest one is suggested.
        """
        if name not in self.table:
            raise RecipeError(
                name,
                f"is not a known {self.kind}{suggest(name, self.table)}",
                f"choose one of: {', '.join(self.table)}",
            )
        module, attribute = self.table[name].split(":")
        return getattr(import_module(module), attribute)
