"""A conversation whose model always says what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.chat.conversation import Conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.data.encode import end_of_turn_id
from edgealign.models.load import load_tokenizer


class Parrot:
    """A session that says the given answers in turn, and remembers what it was fed."""

    def __init__(self, vocab: int, end: int, answers: Sequence[Sequence[int]]) -> None:
        self.vocab, self.end = vocab, end
        self._answers = iter(answers)
        self._rest: Iterator[int] = iter(())
        self.state: list[int] = []
        self.prefills: list[int] = []
        self.resets = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        self.state += tokens
        self.prefills.append(len(tokens))
        self._rest = iter((*next(self._answers), self.end))
        return self._next()

    def step(self, token: int) -> np.ndarray[Any, Any]:
        self.state.append(token)
        return self._next()

    def set_user(self, adapter: Path | None) -> None:
        self.reset()

    def reset(self) -> None:
        self.state = []
        self.resets += 1

    def close(self) -> None:
        self.state = []

    def _next(self) -> np.ndarray[Any, Any]:
        logits = np.zeros(self.vocab, dtype=np.float32)
        logits[next(self._rest)] = 50.0
        return logits


Talk = Callable[..., Conversation]


@pytest.fixture
def talk(tiny_model: Path) -> Talk:
    """`talk(["answer", ...], context=..., **recipe)`: a conversation with a parrot, as tokens of `tiny_model`."""
    tokenizer = load_tokenizer(tiny_model)

    def make(answers: Sequence[str], *, context: int = 512, **options: Any) -> Conversation:
        said = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        session = Parrot(len(tokenizer), end_of_turn_id(tokenizer), said)
        recipe = ChatRecipe(repetition_penalty=1.0, **options)
        return Conversation(session, tokenizer, recipe, context=context)

    return make
