"""A job for the engine and the events of its answer: pieces of text, with log-probabilities where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from assistant.stops import StopText
from edgealign.chat.stream import UNKNOWN, TextStream
from edgealign.runtimes.recipes import Sampling

if TYPE_CHECKING:
    from edgealign.personalize.tilt import Tilt
    from edgealign.runtimes.session import Logits


@dataclass(frozen=True, kw_only=True)
class Personal:
    """What makes an answer a user's own: an adapter as the runtime reads it, or a tilt of the next token; and where it
    comes from, for the answer's facts."""

    adapter: Path | None = None
    tilt: Tilt | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer to make. `top_logprobs`: how many alternatives to report, None: no logprobs; `chat`: ends at the end
    of a turn, and the space before the first word goes; `personal`: in place of what the user has; `grammar`: what the
    answer must follow (constrained.py)."""

    prompt: tuple[int, ...]
    sampling: Sampling
    user: str | None = None
    personal: Personal | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    chat: bool = True
    keep: bool = False
    grammar: str | None = None


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability under the model (with its user's taste; before penalties and filters), and the
    likeliest ones."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that is certain by now, and the tokens since the piece before."""

    text: str
    tokens: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The end of an answer. `finish`: "stop", "length" or "cancelled"; `taste`: facts of what made it personal."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    ttft_s: float
    seconds: float
    taste: Mapping[str, Any] | None = None


Event: TypeAlias = Piece | Answer
Emit: TypeAlias = Callable[[Event | Exception], None]


class Writer:
    """Tokens of one job to pieces of text, with their log-probabilities where they are wanted."""

    def __init__(self, tokenizer: Any, job: Job, emit: Emit) -> None:
        self._tokenizer, self._emit, self._top = tokenizer, emit, job.top_logprobs
        self._stream, self._stop = TextStream(tokenizer, strip=job.chat), StopText(job.stop)
        self._logits: Logits | None = None
        self._tokens: list[Scored] = []

    @property
    def stopped(self) -> bool:
        return self._stop.found

    def see(self, history: Sequence[int], logits: Logits) -> Logits:
        """A hook of the generation loop that only looks."""
        self._logits = logits
        return logits

    def push(self, token: int) -> bool:
        """Whether to go on."""
        if self._top is not None:
            self._tokens.append(self._score(token, self._top))
        self._give(self._stop.push(self._stream.push(token)))
        return not self._stop.found

    def close(self) -> str:
        """What was held back, as a last piece; the whole text."""
        self._give(self._stop.close())
        if self._tokens:
            self._emit(Piece("", tuple(self._tokens)))
        return self._stop.text

    def _give(self, text: str) -> None:
        if text:
            self._emit(Piece(text, tuple(self._tokens)))
            self._tokens = []

    def _score(self, token: int, top: int) -> Scored:
        assert self._logits is not None, "the hook runs before a token is drawn"
        logits = self._logits.astype(np.float64)
        log_probabilities = logits - logits.max()
        log_probabilities -= np.log(np.exp(log_probabilities).sum())
        best = np.argsort(-log_probabilities, kind="stable")[:top] if top else ()
        alternatives = tuple((self._word(int(other)), float(log_probabilities[other])) for other in best)
        return Scored(self._word(token), float(log_probabilities[token]), alternatives)

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


def bytes_of(text: str) -> list[int] | None:
    """A token's bytes; None where it is a part of a character."""
    return None if UNKNOWN in text else list(text.encode())
