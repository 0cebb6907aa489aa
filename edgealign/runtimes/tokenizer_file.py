"""The `tokenizer.json` in a bundle, by the tokenizers library: for runtimes that have no tokenizer of their own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from edgealign.errors import InputError


class TokenizerFile:
    """Read at the first text, once: a session that only gets token ids never needs it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids without BOS; `special` says whether special tokens in the text are tokens or text.

        Raises:
            InputError: the file is missing or no tokenizer.
        """
        self._tokenizer.encode_special_tokens = not special
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises a bare Exception for a file it cannot read
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise InputError(self.path, f"cannot be read ({reason})", "export the bundle again") from error
