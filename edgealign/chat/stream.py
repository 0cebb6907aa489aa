"""Tokens to text as they come, never half a character.

A token of a byte-level BPE is a piece of UTF-8: one character may need four of them. Decoding a prefix shows the
missing rest as U+FFFD, so a U+FFFD at the very end is held back until the next token completes it or shows that it was
damaged. Only the last one can still change: a decoder writes one U+FFFD for each longest broken piece.
"""

from __future__ import annotations

from typing import Any

UNKNOWN = "\ufffd"


class TextStream:
    """`push` a token, get the text that is certain by now. `strip`: without the space before the first word."""

    def __init__(self, tokenizer: Any, *, strip: bool = True) -> None:
        self.text = ""
        self._tokenizer, self._strip = tokenizer, strip
        self._open: list[int] = []  # tokens since the last point where everything was certain
        self._given = 0  # characters of theirs that are in `text` already

    def push(self, token: int) -> str:
        """The new text; often empty."""
        self._open.append(token)
        decoded = str(self._tokenizer.decode(
            self._open, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ))  # fmt: skip
        certain = decoded.removesuffix(UNKNOWN)
        new = certain[self._given :]
        if certain == decoded:
            self._open, self._given = [], 0
        else:
            self._given = len(certain)
        if self._strip and not self.text:
            new = new.lstrip()
        self.text += new
        return new
