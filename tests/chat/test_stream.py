"""Text comes token by token and never as half a character."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgealign.chat.stream import TextStream
from edgealign.models.load import load_tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, then more.", "caf\u00e9 and na\u00efve", "\u65e5\u672c\u8a9e", "a \U0001f600\U0001f680 b",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "ends with \u20ac", "two\n\n- lines\n", "  spaces   inside ",
        "a literal \ufffd stays",
    ],
)  # fmt: skip
def test_pieces_add_up_and_hold_only_whole_characters(tiny_model: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == stream.text == text.lstrip()
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 1


def test_an_unfinished_character_is_not_shown_and_a_broken_one_is_marked_once(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    rocket = tokenizer("\U0001f680", add_special_tokens=False)["input_ids"]
    assert len(rocket) == 4, "the test needs a character of four tokens"
    letter = tokenizer("x", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in rocket[:3]] == ["", "", ""]
    assert stream.text == ""
    assert stream.push(letter[0]) == "\ufffdx"
    assert [stream.push(token) for token in rocket] == ["", "", "", "\U0001f680"]


def test_special_tokens_are_not_text(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.pad_token_id) == ""
    assert stream.push(tokenizer("a", add_special_tokens=False)["input_ids"][0]) == "a"
