"""The model's own chat template: rendering it, its control tokens, its hash.

The date is frozen: some templates write today's date into the prompt (`strftime_now`), and then neither training
nor parity can be repeated. Data that contains a control token of the template is refused, because the tokenizer
would read it as that token: a user could end the assistant's turn. (What is typed into a chat is text: `data.typed`.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from edgealign.data.forms import Message
from edgealign.errors import InputError

# 1 January 2025, a Wednesday. A macro hides the function of the same name; Jinja has no other way to define one.
FROZEN_PARTS = {
    "%-d": "1", "%-m": "1", "%Y": "2025", "%y": "25", "%m": "01", "%d": "01", "%B": "January", "%b": "Jan",
    "%A": "Wednesday", "%a": "Wed", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM", "%j": "001",
}
_FREEZE = "{%- macro strftime_now(format) -%}{{ format" + "".join(
    f" | replace('{part}', '{value}')" for part, value in FROZEN_PARTS.items()
) + " }}{%- endmacro %}\n"  # the environment trims this newline, so the template begins as it did

_ASKED, _ANSWERED = "kQ7 what", "Zr5 that"  # words that no template contains


@dataclass(frozen=True)
class TemplateFacts:
    """What a tokenizer's template writes around turns, found by rendering a small conversation."""

    template: str
    frozen: str
    end_of_turn: str
    end_of_turn_id: int
    bos_id: int | None  # only where it marks the beginning: SmolLM2 names <|im_start|> its BOS, once per turn
    control: re.Pattern[str]


_FACTS: WeakKeyDictionary[Any, TemplateFacts] = WeakKeyDictionary()


def template_hash(tok: Any) -> str:
    """SHA-256 of the template as it stands in the tokenizer, for the manifest."""
    return hashlib.sha256(template_of(tok).encode()).hexdigest()


def template_of(tok: Any) -> str:
    """The template's text.

    Raises:
        InputError: the tokenizer has none.
    """
    template = getattr(tok, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(
            _name(tok), "the tokenizer has no chat template", "use an instruction-tuned model, or edgealign init"
        )
    return str(template)


def end_of_turn_id(tok: Any) -> int:
    """The token that the template writes after an assistant's turn; generation stops at it."""
    return facts_of(tok).end_of_turn_id


def render(tok: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """The messages as the model sees them, with a fixed date.

    Raises:
        InputError: the template refuses these messages.
    """
    facts = _FACTS.get(tok)
    current = template_of(tok)
    frozen = facts.frozen if facts is not None and facts.template == current else _freeze(current)
    return _render(tok, frozen, messages, add_generation_prompt)


def facts_of(tok: Any) -> TemplateFacts:
    """Find the end-of-turn token and the control tokens, once per tokenizer and template.

    Raises:
        InputError: no template, no special token after the answer, or a tokenizer that cannot be cut at turns.
    """
    template = template_of(tok)
    known = _FACTS.get(tok)
    if known is not None and known.template == template:
        return known
    frozen = _freeze(template)
    probe = (Message("user", _ASKED), Message("assistant", _ANSWERED))
    rendered = _render(tok, frozen, probe, False)
    if _ANSWERED not in rendered:
        raise InputError(_name(tok), "the chat template leaves out what the assistant says", "mend the chat template")
    special = {str(token): int(number) for number, token in tok.added_tokens_decoder.items() if token.special}
    tail = rendered.rpartition(_ANSWERED)[2]
    ending = _first_of(special, tail)
    if ending is None:
        raise InputError(
            _name(tok), "the chat template writes no special token after an assistant's turn, so nothing would stop it",
            "mend the chat template",
        )
    _check_cuttable(tok)
    named = {str(token) for token in (tok.bos_token, tok.eos_token, tok.pad_token) if token}
    control = {token for token in special if token in rendered} | named
    longest_first = sorted(control, key=len, reverse=True)
    longer = _render(tok, frozen, (*probe, *probe), False)
    marks_beginning = bool(tok.bos_token) and rendered.count(tok.bos_token) == longer.count(tok.bos_token)
    facts = TemplateFacts(
        template, frozen, ending, special[ending], tok.bos_token_id if marks_beginning else None,
        re.compile("|".join(map(re.escape, longest_first))),
    )
    _FACTS[tok] = facts
    return facts


def check_content(tok: Any, messages: Sequence[Message]) -> None:
    """No text may contain a control token.

    Raises:
        InputError: names the turn and the token.
    """
    for number, message in enumerate(messages, start=1):
        for text in (message.content, *(call.arguments for call in message.tool_calls)):
            check_text(tok, text, f"turn {number} ({message.role})")


def check_text(tok: Any, text: str, name: str) -> None:
    """Like `check_content`, for one text called `name`."""
    found = facts_of(tok).control.search(text)
    if found:
        raise InputError(
            name, f"its text contains the control token {found.group()}",
            "take it out: the tokenizer would read it as the start or the end of a turn",
        )


def _freeze(template: str) -> str:
    return _FREEZE + template if "strftime_now" in template else template


def _render(tok: Any, template: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    import jinja2

    try:
        rendered = tok.apply_chat_template(
            [message.as_dict() for message in messages], chat_template=template, tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(_name(tok), f"the chat template refuses these turns ({reason})", "mend the row") from error
    return str(rendered)


def _first_of(tokens: dict[str, int], text: str) -> str | None:
    """The token that stands first in the text; the longest where two begin together."""
    found = [(text.index(token), -len(token), token) for token in tokens if token in text]
    return min(found)[2] if found else None


def _check_cuttable(tok: Any) -> None:
    """Pieces of a text must give the tokens that they give inside it: no invisible space before each piece."""
    alone = tok("that", add_special_tokens=False)["input_ids"]
    if str(tok.convert_ids_to_tokens(alone[0])).startswith("\u2581"):
        raise InputError(
            _name(tok), "the tokenizer puts a space before every piece of text (SentencePiece prefix)",
            "use a model with a byte-level tokenizer",
        )


def _name(tok: Any) -> str:
    return str(getattr(tok, "name_or_path", "") or "the tokenizer")
