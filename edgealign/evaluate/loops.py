"""Doom loops: an answer that says the same again and again until it is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

SPAN, TIMES = 4, 4  # a run of so many tokens, so often


def repeats(tokens: Sequence[Hashable], *, span: int = SPAN) -> int:
    """How often the commonest run of `span` tokens comes. a b a b a b with span 2: 3."""
    runs = Counter(tuple(tokens[i : i + span]) for i in range(len(tokens) - span + 1))
    return max(runs.values(), default=0)


def repeated_share(tokens: Sequence[Hashable], *, span: int = SPAN) -> float:
    """Share of the runs of `span` tokens that came before in the answer, 0 to 1."""
    runs = [tuple(tokens[i : i + span]) for i in range(len(tokens) - span + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_doom_loop(tokens: Sequence[Hashable], *, span: int = SPAN, times: int = TIMES) -> bool:
    """Does a run of `span` tokens come `times` times or more?"""
    return repeats(tokens, span=span) >= times
