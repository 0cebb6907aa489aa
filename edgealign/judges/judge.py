"""One protocol for all judges, and the function that opens one by what the user wrote.

    judge = open_judge("rule:formality")            # an attribute of the text; -formality is its opposite
    judge = open_judge("reward:runs/head")          # a reward head: edgealign reward; reward:HEAD@MODEL if it moved
    judge = open_judge("http://127.0.0.1:8080/v1")  # an OpenAI-compatible endpoint; MODEL@URL names its model

A judge gives every answer a number, and more is better. Two answers whose numbers are equal are a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgealign.data.forms import Message
from edgealign.errors import UsageError
from edgealign.registry import suggest

Question = tuple[tuple[Message, ...], str]  # the conversation up to the answer, and the answer


class Judge(Protocol):
    """`name` says in a report who has judged."""

    @property
    def name(self) -> str: ...

    def scores(self, questions: Sequence[Question]) -> list[float]:
        """A number for every answer; more is better."""

    def close(self) -> None:
        """Free what it holds."""


def open_judge(text: str, *, threads: int = 0) -> Judge:
    """The judge that `text` names: `rule:NAME`, `reward:DIR`, an URL, or `MODEL@URL`.

    Raises:
        UsageError: it names none.
        ArtifactError, InputError: the reward head cannot be used.
    """
    kind, _, rest = text.partition(":")
    if "://" in text:
        from edgealign.judges.endpoint import Endpoint

        return Endpoint.parse(text)
    if kind == "rule" and rest:
        from edgealign.judges.rule import Rule

        return Rule(rest)
    if kind == "reward" and rest:
        from edgealign.judges.reward import open_reward

        head, _, model = rest.partition("@")
        return open_reward(head, threads=threads, model=model or None)
    hint = suggest(kind, ("rule", "reward"))
    raise UsageError(text, f"names no judge{hint}", "give rule:NAME, reward:DIR, or the URL of an endpoint")


def verdict(ours: float, theirs: float) -> float:
    """1 where ours is better, 0 where theirs is, 0.5 for a tie."""
    return 0.5 * (1 + (ours > theirs) - (ours < theirs))
