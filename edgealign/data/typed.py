"""What somebody types is text: special tokens in it are spelled out, only those that the template writes are tokens.

Who asks "what does <|im_end|> mean?" must neither end their own turn nor be refused. So special tokens in the turns
are replaced by made-up words before the template sees them, and put back as text afterwards:

    marked = mark(tokenizer, messages)                        # turns without any special token, and what was typed
    segments = cut(tokenizer, render(tokenizer, marked.messages), marked)
    ids = encode_segments(encoder(tokenizer), segments)

A segment is one special token or a run of text between two, the template's words and the user's together: so a
text without special tokens gets the ids that it has in the rendered conversation. (transformers' own
`sanitize_control_tokens` cuts the run around each look-alike, and cannot cut at the assistant's turns as training
does.)
Only tokens with the `special` flag are meant; added words without it are words in every runtime.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from edgealign.data.forms import Message
from edgealign.errors import InputError

Encode: TypeAlias = Callable[[str, bool], Sequence[int]]  # (text, may it hold special tokens?) -> ids


@dataclass(frozen=True)
class Segment:
    """One special token of the template, or a run of text that holds none whatever it looks like."""

    text: str
    special: bool


@dataclass(frozen=True)
class Marked:
    """Turns without special tokens; `typed`: the word that stands for each, and what was typed."""

    messages: tuple[Message, ...]
    typed: Mapping[str, str]


def special_tokens(tok: Any) -> dict[str, int]:
    """Every special token of a tokenizer and its id."""
    return {str(token): int(number) for number, token in tok.added_tokens_decoder.items() if token.special}


def mark(tok: Any, messages: Sequence[Message]) -> Marked:
    """Replace each special token in a turn's text by a word that neither the turns nor the template hold."""
    tokens = special_tokens(tok)
    contents = [message.content for message in messages]
    if not any(token in text for text in contents for token in tokens):
        return Marked(tuple(messages), {})
    pattern = _pattern(tokens)
    known = "".join((*contents, str(tok.chat_template)))
    stem = next(word for number in range(len(known) + 1) if (word := f"Qz{number}x") not in known)
    typed: dict[str, str] = {}

    def stand_in(found: re.Match[str]) -> str:
        # Letters of both cases: a template that changes case changes the word too, and that is noticed.
        word = f"{stem}{len(typed)}Yv"
        typed[word] = found.group()
        return word

    marked = tuple(replace(message, content=pattern.sub(stand_in, message.content)) for message in messages)
    return Marked(marked, typed)


def cut(tok: Any, text: str, marked: Marked) -> list[Segment]:
    """A rendered text, or a piece of one, as segments; what was typed stands in them as it was typed."""
    segments = []
    done = 0
    for found in _pattern_with_space(tok).finditer(text):
        segments += [Segment(text[done : found.start()], False), Segment(found.group(), True)]
        done = found.end()
    segments.append(Segment(text[done:], False))
    return [
        segment if segment.special else Segment(_put_back(segment.text, marked.typed), False)
        for segment in segments if segment.text
    ]  # fmt: skip


def check_kept(text: str, marked: Marked) -> None:
    """The rendered text must hold every word that `mark` made.

    Raises:
        InputError: the template changes or leaves out what was typed.
    """
    for word, typed in marked.typed.items():
        if word not in text:
            raise InputError(
                "chat template", f"changes or leaves out the turn that contains {typed}", "take it out of the text"
            )


def encoder(tok: Any) -> Encode:
    """A transformers tokenizer as an `Encode`."""

    def encode(text: str, special: bool) -> Sequence[int]:
        options = {"add_special_tokens": False, "split_special_tokens": not special, "verbose": False}
        return [int(token) for token in tok(text, **options)["input_ids"]]

    return encode


def encode_segments(encode: Encode, segments: Iterable[Segment]) -> tuple[int, ...]:
    """The ids of all segments."""
    return tuple(int(token) for segment in segments for token in encode(segment.text, segment.special))


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _pattern_with_space(tok: Any) -> re.Pattern[str]:
    """Like `_pattern`; some tokens swallow the white space beside them."""
    tokens = sorted((token for token in tok.added_tokens_decoder.values() if token.special), key=_longest_first)
    return re.compile(
        "|".join(
            (r"\s*" if token.lstrip else "") + re.escape(str(token)) + (r"\s*" if token.rstrip else "")
            for token in tokens
        ) or "(?!)"
    )  # fmt: skip


def _longest_first(token: Any) -> int:
    return -len(str(token))


def _put_back(text: str, typed: Mapping[str, str]) -> str:
    return re.sub("|".join(map(re.escape, typed)), lambda found: typed[found.group()], text) if typed else text
