"""Turns: other people's names for speakers, and the order that a chat must have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgealign.data.faults import RowFault
from edgealign.data.forms import ROLES, Message, ToolCall

# ShareGPT and its children
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}
# Schema-guided dialogue (U/S), Taskmaster 4 (U/A), Topical-Chat and Persona-Chat (1/2, the second one answers)
SPEAKERS = {"U": "user", "S": "assistant", "A": "assistant", "1": "user", "2": "assistant"}
# Taskmaster reward rows: the agent speaks or calls an API, the API answers
TASKMASTER_ROLES = {"user": "user", "agent": "assistant", "api": "tool"}

# who may speak after whom; None is the start of the conversation
_FOLLOWS: Mapping[str | None, tuple[str, ...]] = {
    None: ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def text_of(row: Mapping[str, Any], column: str, *, may_be_blank: bool = False) -> str:
    """A column that must be text.

    Raises:
        RowFault: absent, of another type, or blank.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise _wrong_type(column, value, "text")
    if not may_be_blank and not value.strip():
        raise RowFault("empty", f"{column} is empty")
    return value


def prompt_of(row: Mapping[str, Any], column: str = "prompt") -> tuple[Message, ...]:
    """A prompt as text (with an optional `system` column) or as messages; it ends where an answer is due."""
    value = row.get(column)
    if isinstance(value, str):
        if not value.strip():
            raise RowFault("empty", f"{column} is empty")
        return (*system_of(row), Message("user", value))
    messages = (*system_of(row), *messages_of(value, column))
    check_order(messages, column)
    if messages[-1].role not in ("user", "tool"):
        raise RowFault("roles", f"{column} ends with the {messages[-1].role}, so no answer is due")
    return messages


def system_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The optional `system` column; a blank one means none."""
    if "system" not in row:
        return ()
    text = text_of(row, "system", may_be_blank=True)
    return (Message("system", text),) if text.strip() else ()


def messages_of(value: object, column: str) -> tuple[Message, ...]:
    """A list of `{role, content}`; content is text, or parts of text, or absent beside tool calls."""
    if not isinstance(value, list):
        raise _wrong_type(column, value, "text or a list of messages")
    if not value:
        raise RowFault("empty", f"{column} is an empty list")
    return tuple(_message(item, number, column) for number, item in enumerate(value, start=1))


def turns_of(value: object, column: str, *, roles: Mapping[str, str], keys: tuple[Any, Any]) -> tuple[Message, ...]:
    """Turns whose speaker and text stand under `keys` (of dictionaries or of pairs), under other names of roles."""
    if not isinstance(value, list):
        raise _wrong_type(column, value, "a list of turns")
    if not value:
        raise RowFault("empty", f"{column} is an empty list")
    messages = []
    for number, turn in enumerate(value, start=1):
        try:
            speaker, text = turn[keys[0]], turn[keys[1]]
        except (KeyError, IndexError, TypeError):
            raise RowFault("columns", f"turn {number} of {column} has no {keys[0]} and {keys[1]}") from None
        role = roles.get(str(speaker))
        if role is None:
            raise RowFault("roles", f"turn {number} of {column} has an unknown speaker")
        messages.append(_turn(role, text, number, column))
    return tuple(messages)


def check_order(messages: Sequence[Message], column: str) -> None:
    """System first if at all, then user and assistant in turns; tools answer the assistant.

    Raises:
        RowFault: names the first turn that is out of order.
    """
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        if message.role not in _FOLLOWS[before]:
            after = f"after {before}" if before else "at the start"
            raise RowFault("roles", f"roles do not alternate: turn {number} of {column} is {message.role} {after}")
        before = message.role


def answer_of(row: Mapping[str, Any], column: str) -> str:
    """A completion: text, or a list of exactly one assistant message."""
    value = row.get(column)
    if isinstance(value, str):
        return text_of(row, column)
    messages = messages_of(value, column)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise RowFault("roles", f"{column} is not one assistant message")
    return plain_content(messages[0], column)


def plain_content(message: Message, column: str) -> str:
    """The text of an answer that must be text alone."""
    if message.tool_calls:
        raise RowFault("columns", f"{column} is a tool call; only text can be compared: write the call as text")
    return message.content


def _message(item: object, number: int, column: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowFault("columns", f"turn {number} of {column} is not an object with role and content")
    role = item.get("role")
    if role not in ROLES:
        raise RowFault("roles", f"turn {number} of {column} has no role out of {', '.join(ROLES)}")
    calls = _tool_calls(item.get("tool_calls"), number, column)
    if calls and role != "assistant":
        raise RowFault("roles", f"turn {number} of {column}: only the assistant calls tools")
    content = item.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, number, column)
    if calls:
        return Message(role, content if isinstance(content, str) else "", calls)
    return _turn(role, content, number, column)


def _turn(role: str, text: object, number: int, column: str) -> Message:
    if not isinstance(text, str):
        raise RowFault("columns", f"turn {number} of {column} is {_type(text)}, not text")
    if not text.strip():
        raise RowFault("empty", f"turn {number} of {column} ({role}) is empty")
    return Message(role, text)


def _joined_parts(parts: Sequence[object], number: int, column: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowFault("columns", f"turn {number} of {column} has a part that is not text")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(value: object, number: int, column: str) -> tuple[ToolCall, ...]:
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise RowFault("columns", f"turn {number} of {column}: tool_calls is {_type(value)}, not a list")
    calls = []
    for entry in value:
        call = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise RowFault("columns", f"turn {number} of {column}: a tool call has no function name")
        arguments = call.get("arguments", {})
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            parsed = None
        if not isinstance(parsed, Mapping):
            raise RowFault("columns", f"turn {number} of {column}: the arguments of a tool call are no JSON object")
        calls.append(ToolCall(call["name"], json.dumps(parsed, ensure_ascii=False)))
    return tuple(calls)


def _wrong_type(column: str, value: object, wanted: str) -> RowFault:
    if value is None:
        return RowFault("columns", f"column {column} is missing or null")
    return RowFault("columns", f"{column} is {_type(value)}, not {wanted}")


def _type(value: object) -> str:
    names = {
        dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
