"""Answers that are JSON, or follow a JSON schema: a hook of the generation loop, so that every runtime can.

    grammars = Grammars(tokenizer, end)
    generate(session, prompt, hooks=[grammars.hook(grammars.compile(schema))])

llguidance keeps a parser of the schema beside the answer and says which tokens may come next; the logits of the others
become -inf. It is always the model that chooses, among what is allowed. An answer that ends because of its length is
the beginning of such a JSON.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.hf
import numpy as np

from assistant.faults import Fault

if TYPE_CHECKING:
    from edgealign.runtimes.generate import LogitsHook
    from edgealign.runtimes.session import Logits

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Grammars:
    """Schemas for one model's tokenizer; an answer ends with the token `end`."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end
        self._making = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None

    def compile(self, schema: Mapping[str, Any]) -> str:
        """A schema as a grammar.

        Raises:
            Fault: it is no schema that can be followed.
        """
        try:
            grammar = str(llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema),  # one form of spacing: a small model can lose itself in blanks that mean nothing
                defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            ))  # fmt: skip
            wrong = llguidance.LLMatcher.validate_grammar(grammar, self._tokens())
        except (ValueError, RecursionError) as error:
            wrong = str(error)
        if wrong:
            raise _unfollowed(wrong)
        return grammar

    def hook(self, grammar: str) -> LogitsHook:
        """For one answer."""
        matcher = llguidance.LLMatcher(self._tokens(), grammar)
        seen: int | None = None

        def allow(history: Sequence[int], logits: Logits) -> Logits:
            nonlocal seen
            if seen is not None:
                matcher.consume_tokens(list(history[seen:]))
            seen = len(history)
            allowed = np.zeros(len(logits), dtype=bool)
            if matcher.is_stopped():
                allowed[self._end] = True
            else:
                bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
                shared = min(len(bits), len(logits))  # some runtimes pad the vocabulary
                allowed[:shared] = bits[:shared].astype(bool)
            if matcher.is_error():
                raise _unfollowed(matcher.get_error())
            return np.where(allowed, logits, np.float32(-np.inf))

        return allow

    def _tokens(self) -> llguidance.LLTokenizer:
        """Made once, when it is asked for: it takes about a second for a large vocabulary."""
        with self._making:
            if self._made is None:
                self._made = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self._end)
            return self._made


def _unfollowed(reason: str) -> Fault:
    text = f"the schema cannot be followed: {' '.join(reason.split())[:200]}"
    return Fault(400, text, code="invalid_value", param="response_format")
