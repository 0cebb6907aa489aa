"""Turns to token ids and the loss mask.

Only what the assistant says is learned, with the token that ends its turn and without the newline behind it. A
conversation is cut at the start of each assistant turn and at its end-of-turn token, and the pieces are tokenised
one by one: so the tokens of an answer never depend on where it was trained (SFT, pairs, thumbs), and a prompt has the
tokens that it has when the model is asked to answer.

    Encoded.ids    <bos> <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello <|im_end|> \\n
    Encoded.mask     0        0        0   0  0      0     0       0           0      0    1        1     0

A text with a control token is refused, because in training data it is a mistake; `encode_prompt(..., typed=True)` is
for a conversation with somebody who types, where it is text.

What is too long is cut at its end: the start of a conversation, and of both answers of a pair, is kept. A row of which
nothing to learn would be left is refused by the functions for one row, and listed by those for many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeAlias, TypeVar

from edgealign.data.forms import Conversation, Message, Pair, Text, Thumb
from edgealign.data.template import check_content, check_text, end_of_turn_id, facts_of, render, template_hash
from edgealign.data.typed import check_kept, cut, encode_segments, encoder, mark
from edgealign.errors import InputError

__all__ = [
    "Encoded", "EncodedPair", "EncodedRows", "EncodedThumb", "encode_answer", "encode_conversation",
    "encode_conversations", "encode_pair", "encode_pairs", "encode_prompt", "encode_text", "encode_texts",
    "encode_thumb", "encode_thumbs", "end_of_turn_id", "render", "template_hash",
]

Ids: TypeAlias = tuple[int, ...]
EncodedPair: TypeAlias = tuple[Ids, Ids, Ids]  # prompt, chosen, rejected
EncodedThumb: TypeAlias = tuple[Ids, Ids]  # prompt, completion
RowT = TypeVar("RowT")
OutT = TypeVar("OutT")


@dataclass(frozen=True)
class Encoded:
    """`mask[i]` says that token i is learned; `cut` counts the tokens that did not fit."""

    ids: Ids
    mask: tuple[bool, ...]
    cut: int = 0


@dataclass(frozen=True)
class EncodedRows(Generic[OutT]):
    """Many rows: `kept[i]` is the row's place in the input; `refused` says why the others are not here."""

    rows: tuple[OutT, ...]
    kept: tuple[int, ...]
    cut: int
    refused: tuple[tuple[int, str], ...]


def encode_conversation(tok: Any, messages: Sequence[Message], *, max_tokens: int | None = None) -> Encoded:
    """A whole conversation; True in the mask is the assistant's text and end-of-turn.

    Raises:
        InputError: the template does not fit the messages, or no learned token is within `max_tokens`.
    """
    ids: list[int] = []
    mask: list[bool] = []
    pieces = _pieces(tok, messages)
    for (_, learned), tokens in zip(pieces, _tokens(tok, [piece for piece, _ in pieces]), strict=True):
        ids += tokens
        mask += [learned] * len(tokens)
    _check_bos(tok, ids)
    length = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    if not any(mask[:length]):
        where = f"in its first {max_tokens} tokens" if any(mask) else "at all"
        raise InputError("conversation", f"has nothing of the assistant {where}", "raise max_tokens or drop the row")
    return Encoded(tuple(ids[:length]), tuple(mask[:length]), len(ids) - length)


def encode_prompt(tok: Any, messages: Sequence[Message], *, typed: bool = False) -> Ids:
    """What the model sees when an answer to `messages` is due: with the generation prompt, BOS once.

    Args:
        typed: special tokens in the turns' text are encoded as text; without it control tokens are refused, and other
            special tokens are tokens. Turns that hold none have the same ids either way.

    Raises:
        InputError: the template does not fit the messages, or changes a turn with a special token in it.
    """
    marked = mark(tok, messages) if typed else None
    if marked is None or not marked.typed:
        pieces = _pieces(tok, messages, add_generation_prompt=True)
        ids = tuple(chain.from_iterable(_tokens(tok, [piece for piece, _ in pieces])))
    else:
        pieces = _pieces(tok, marked.messages, add_generation_prompt=True)
        check_kept("".join(piece for piece, _ in pieces), marked)
        encode = encoder(tok)
        ids = tuple(chain.from_iterable(encode_segments(encode, cut(tok, piece, marked)) for piece, _ in pieces))
    _check_bos(tok, ids)
    return ids


def encode_pair(tok: Any, pair: Pair, *, max_tokens: int | None = None) -> EncodedPair:
    """Prompt, chosen and rejected ids; each answer ends with the end-of-turn token, once, unless it was cut.

    Raises:
        InputError: the prompt leaves no room for an answer, or what is left of the two answers is the same.
    """
    prompt = encode_prompt(tok, pair.prompt)
    chosen, rejected = (_answer(tok, pair.prompt, text) for text in (pair.chosen, pair.rejected))
    room = _room(prompt, max_tokens)
    chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected:
        raise InputError("pair", f"the first {room} tokens of both answers are the same", "raise max_tokens")
    return prompt, chosen, rejected


def encode_answer(tok: Any, prompt: Sequence[Message], text: str, *, max_tokens: int | None = None) -> Ids:
    """The ids of an answer to `prompt`, cut like a pair's.

    Raises:
        InputError: as `encode_pair`.
    """
    return _answer(tok, prompt, text)[: _room(encode_prompt(tok, prompt), max_tokens)]


def encode_thumb(tok: Any, thumb: Thumb, *, max_tokens: int | None = None) -> EncodedThumb:
    """Prompt and completion ids, cut like a pair's."""
    prompt = encode_prompt(tok, thumb.prompt)
    return prompt, _answer(tok, thumb.prompt, thumb.completion)[: _room(prompt, max_tokens)]


def encode_text(tok: Any, text: str, *, max_tokens: int, name: str = "text") -> tuple[Encoded, ...]:
    """Plain text in pieces of `max_tokens`, each after what the tokenizer puts first (BOS); nothing is lost.

    Raises:
        InputError: the text (called `name`) contains a control token.
    """
    check_text(tok, text, name)
    first = tok("a")["input_ids"][0]
    begin = (int(first),) if first == tok.bos_token_id else ()
    size = max_tokens - len(begin)
    if size < 1:
        raise InputError(max_tokens, "is too few tokens for a piece of text", "raise max_tokens")
    (ids,) = _tokens(tok, [text])
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return tuple(Encoded((*begin, *piece), (*(False for _ in begin), *(True for _ in piece))) for piece in pieces)


def encode_conversations(
    tok: Any, rows: Iterable[Conversation], *, max_tokens: int | None = None
) -> EncodedRows[Encoded]:
    """Every conversation that has something to learn within `max_tokens`; the others are listed, not lost."""
    return _many(
        rows, lambda row: encode_conversation(tok, row.messages, max_tokens=max_tokens), lambda one: one.cut > 0
    )


def encode_pairs(tok: Any, rows: Iterable[Pair], *, max_tokens: int | None = None) -> EncodedRows[EncodedPair]:
    """Every pair that fits; `cut` counts those of which an answer lost its end."""
    end = end_of_turn_id(tok)
    return _many(
        rows, lambda row: encode_pair(tok, row, max_tokens=max_tokens), lambda one: {one[1][-1], one[2][-1]} != {end}
    )


def encode_thumbs(tok: Any, rows: Iterable[Thumb], *, max_tokens: int | None = None) -> EncodedRows[EncodedThumb]:
    """Every thumb that fits; `cut` counts the answers that lost their end."""
    end = end_of_turn_id(tok)
    return _many(rows, lambda row: encode_thumb(tok, row, max_tokens=max_tokens), lambda one: one[1][-1] != end)


def encode_texts(tok: Any, rows: Iterable[Text], *, max_tokens: int) -> tuple[Encoded, ...]:
    """All pieces of all texts, in order."""
    return tuple(
        piece
        for number, row in enumerate(rows, start=1)
        for piece in encode_text(tok, row.text, max_tokens=max_tokens, name=f"text {number}")
    )


def _many(
    rows: Iterable[RowT], encode: Callable[[RowT], OutT], was_cut: Callable[[OutT], bool]
) -> EncodedRows[OutT]:
    done: list[OutT] = []
    kept: list[int] = []
    refused: list[tuple[int, str]] = []
    for place, row in enumerate(rows):
        try:
            done.append(encode(row))
            kept.append(place)
        except InputError as error:
            refused.append((place, error.line()))
    return EncodedRows(tuple(done), tuple(kept), sum(map(was_cut, done)), tuple(refused))


def _pieces(
    tok: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> list[tuple[str, bool]]:
    """The rendered text, cut around what the assistant says: (text, learned)."""
    check_content(tok, messages)
    end_of_turn = facts_of(tok).end_of_turn
    whole = render(tok, messages, add_generation_prompt=add_generation_prompt)
    pieces = []
    done = 0
    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = _start_of_answer(tok, messages[:place], whole)
        end = whole.find(end_of_turn, start)
        if start < done or end < 0:
            raise InputError(f"turn {place + 1}", "the chat template does not end the assistant's turn", "mend it")
        end += len(end_of_turn)
        _check_written(message, whole[start:end], place + 1)
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    return [*pieces, (whole[done:], False)] if whole[done:] else pieces


def _start_of_answer(tok: Any, before: Sequence[Message], whole: str) -> int:
    """Where the answer to `before` begins: what the model sees at generation must be how `whole` begins."""
    if not before:  # the assistant opens: no rendering of nothing exists, so look behind a made-up first turn
        opening = (Message("user", "?"),)
        header = render(tok, opening, add_generation_prompt=True)[len(render(tok, opening)) :]
        at = whole.find(header)
        if at < 0:
            raise InputError("chat template", "cannot open a conversation with the assistant", "mend the row")
        return at + len(header)
    prompt = render(tok, before, add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise InputError(
            "chat template", f"is not prefix-stable: the text before turn {len(before) + 1} changes once it is there",
            "train on single answers (the last turn only), or mend the chat template",
        )
    return len(prompt)


def _check_written(message: Message, written: str, number: int) -> None:
    """The template must not lose what is to be learned."""
    if message.content.strip() not in written:
        raise InputError(f"turn {number}", "the chat template changes or leaves out the assistant's text", "mend it")
    for call in message.tool_calls:
        if call.name not in written:
            raise InputError(
                f"turn {number}", "the chat template leaves out tool_calls", "write the calls into the content instead"
            )


def _answer(tok: Any, prompt: Sequence[Message], text: str) -> Ids:
    """The ids of an answer to `prompt`, through its end-of-turn token."""
    messages = (*prompt, Message("assistant", text))
    check_content(tok, messages[-1:])
    end_of_turn = facts_of(tok).end_of_turn
    whole = render(tok, messages)
    start = _start_of_answer(tok, prompt, whole)
    end = whole.find(end_of_turn, start)
    if end < 0:
        raise InputError("chat template", "does not end the assistant's turn", "mend it")
    _check_written(messages[-1], whole[start : end + len(end_of_turn)], len(messages))
    return _tokens(tok, [whole[start : end + len(end_of_turn)]])[0]


def _tokens(tok: Any, pieces: Sequence[str]) -> list[Ids]:
    """One call for all pieces: a tokenizer's overhead per call is most of its time."""
    return [tuple(ids) for ids in tok(list(pieces), add_special_tokens=False, verbose=False)["input_ids"]]


def _room(prompt: Ids, max_tokens: int | None) -> int | None:
    if max_tokens is None:
        return None
    if len(prompt) >= max_tokens:
        raise InputError(
            "prompt", f"its {len(prompt)} tokens leave no room for an answer in {max_tokens}", "raise max_tokens"
        )
    return max_tokens - len(prompt)


def _check_bos(tok: Any, ids: Sequence[int]) -> None:
    bos = facts_of(tok).bos_id
    if bos is not None and list(ids).count(bos) > 1:
        raise InputError("chat template", "writes the begin-of-text token more than once", "mend the chat template")
