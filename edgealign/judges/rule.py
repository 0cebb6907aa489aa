"""A judge by rule: one attribute of an answer's text, or its opposite. It knows nothing of the question."""

from __future__ import annotations

from collections.abc import Sequence

from edgealign.errors import UsageError
from edgealign.judges.judge import Question
from edgealign.personalize.attributes import ATTRIBUTES
from edgealign.registry import suggest


class Rule:
    """More of an attribute is better; with a minus in front, less.

    Raises:
        UsageError: there is no such attribute.
    """

    def __init__(self, attribute: str) -> None:
        self.name = f"rule:{attribute}"
        wanted = attribute.removeprefix("-")
        if wanted not in ATTRIBUTES:
            hint = suggest(wanted, ATTRIBUTES)
            raise UsageError(attribute, f"is no attribute{hint}", f"choose from: {', '.join(ATTRIBUTES)}")
        self._measure = ATTRIBUTES[wanted]
        self._sign = -1.0 if attribute.startswith("-") else 1.0

    def scores(self, questions: Sequence[Question]) -> list[float]:
        return [self._sign * self._measure(answer) for _, answer in questions]

    def close(self) -> None:
        return None
