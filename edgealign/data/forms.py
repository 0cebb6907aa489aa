"""The four forms that training data can take, and nothing else.

    conversation   messages; only the assistant's turns are learned
    text           plain text; everything is learned
    pair           one prompt, a chosen and a rejected answer, of one user or of nobody in particular; `facts` is what
                   some preference objectives read beside them (PAIR_NUMBERS, PAIR_TEXTS, PAIR_LISTS)
    thumb          one prompt, one answer, liked or not

`read` makes these from any file, `encode` turns them into token ids. `to_json` is the canonical spelling: what it
writes, `read` reads back equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

FORMS = ("conversation", "text", "pair", "thumb")
ROLES = ("system", "user", "assistant", "tool")
PAIR_NUMBERS = ("epsilon", "score", "advantage", "advantage_rejected")
PAIR_TEXTS = ("gold", "base", "calibration", "rationale", "rejected_prompt")
PAIR_LISTS = ("grades", "others")  # a ranked list: answers beside the two, and a grade of chosen, rejected, others
OF_A_SIDE = ("score", "advantage", "advantage_rejected", "rationale", "rejected_prompt", "grades")  # wrong once turned


Fact: TypeAlias = float | str | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant turn; `arguments` is a JSON object as text."""

    name: str
    arguments: str = "{}"


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The shape that chat templates expect."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in self.tool_calls
            ]
        return plain


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    user_id: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    user_id: str | None = None
    margin: float | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Thumb:
    prompt: tuple[Message, ...]
    completion: str
    label: bool
    user_id: str | None = None


Row: TypeAlias = Conversation | Text | Pair | Thumb


def form_of(row: Row) -> str:
    """The name in FORMS that a row belongs to."""
    return {Conversation: "conversation", Text: "text", Pair: "pair", Thumb: "thumb"}[type(row)]


def user_of(row: Row) -> str | None:
    return None if isinstance(row, Text) else row.user_id


def texts(row: Row) -> Iterator[str]:
    """Every piece of human-readable text in a row, in order: what a tokenizer is trained on."""
    if isinstance(row, Text):
        yield row.text
        return
    messages = row.messages if isinstance(row, Conversation) else row.prompt
    for message in messages:
        yield message.content
        for call in message.tool_calls:
            yield call.name
            yield call.arguments
    if isinstance(row, Pair):
        yield row.chosen
        yield row.rejected
        for fact in row.facts.values():
            yield from (text for text in (fact if isinstance(fact, tuple) else (fact,)) if isinstance(text, str))
    elif isinstance(row, Thumb):
        yield row.completion


def to_json(row: Row) -> dict[str, Any]:
    """The canonical columns of a row; optional ones only where they have a value."""
    if isinstance(row, Text):
        return {"text": row.text}
    columns: dict[str, Any]
    if isinstance(row, Conversation):
        columns = {"messages": _plain(row.messages)}
    elif isinstance(row, Pair):
        columns = {"prompt": _plain(row.prompt), "chosen": row.chosen, "rejected": row.rejected}
        if row.margin is not None:
            columns["margin"] = row.margin
        columns |= {name: list(fact) if isinstance(fact, tuple) else fact for name, fact in row.facts.items()}
    else:
        columns = {"prompt": _plain(row.prompt), "completion": row.completion, "label": row.label}
    if row.user_id is not None:
        columns["user_id"] = row.user_id
    return columns


def _plain(messages: tuple[Message, ...]) -> list[Mapping[str, Any]]:
    return [message.as_dict() for message in messages]
