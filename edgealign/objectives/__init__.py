"""Preference objectives: pure functions of per-token log-probabilities, and the table that names them.

    from edgealign.objectives import Scores, find, pair_loss

    pair_loss(find("ln_dpo"), policy, reference).loss      # (P,)

`OBJECTIVES`, `Objective`, `find` and `read_settings` load no torch; `pair_loss`, `list_loss` and `Scores` do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgealign.objectives.entries import OBJECTIVES
    from edgealign.objectives.lists import list_loss
    from edgealign.objectives.loss import pair_loss
    from edgealign.objectives.scores import Scores
    from edgealign.objectives.settings import read_settings
    from edgealign.objectives.table import Objective, find

__all__ = ["OBJECTIVES", "Objective", "Scores", "find", "list_loss", "pair_loss", "read_settings"]

_HOMES = {
    "OBJECTIVES": "entries", "Objective": "table", "Scores": "scores", "find": "table", "list_loss": "lists",
    "pair_loss": "loss", "read_settings": "settings",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
