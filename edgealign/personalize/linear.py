"""Linear alignment: answers that follow a stated preference further than its prompt does, decided while decoding.

Two streams of one model answer the same question, one with the preference in its system turn (p), one without (0).
After each token their logits are mixed, z = (1 + strength) z_p - strength z_0, among the tokens that are plausible
where the preference is stated: the top-p set of softmax(z_p / T). The token that is drawn goes to both. Nothing is
learned; a token costs two passes. Strength 0 is prompting with the preference, exactly: one stream, no mask.

    lead = find_lead(tokenizer, "Answer with bullet points.")
    session = MixedSession(open_streams("bundle"), lead, Mixing(strength=2.0))
    generate(session, encode_prompt(tokenizer, [Message("system", "Answer with bullet points."), ...]))

A `MixedSession` is a session like any other: it is fed prompts with the preference, and itself feeds the second stream
the same prompt without it. What generates, chats or measures need not know.

Source: Gao et al., Linear Alignment, arXiv 2401.11458, and its released model.py. Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.data.forms import Message
from edgealign.errors import InputError, UsageError
from edgealign.personalize.steering_recipe import MASK_TEMPERATURE, MAX_STRENGTH, PLAUSIBLE, STRENGTH

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Logits
    from edgealign.runtimes.streams import Streams

PROBES = ("Hi", "7 + 1?", "'tis so", "\u00e9t\u00e9")  # first words of a question that tokenise in different ways


@dataclass(frozen=True)
class Mixing:
    """How far to go, and which tokens are plausible: those of the top-p set at this temperature."""

    strength: float = STRENGTH
    plausible: float = PLAUSIBLE
    temperature: float = MASK_TEMPERATURE

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= MAX_STRENGTH:  # a NaN is not, either
            raise UsageError(self.strength, f"is no strength from 0 to {MAX_STRENGTH:g}", "try 2")
        if not 0.0 < self.plausible <= 1.0:
            raise UsageError(self.plausible, "is no share above 0 and up to 1", "try 0.8")
        if not 0.0 < self.temperature < float("inf"):
            raise UsageError(self.temperature, "is no temperature above 0", "try 1")


@dataclass(frozen=True)
class Lead:
    """The tokens that every prompt with the preference begins with, and those that stand there without it."""

    preferred: tuple[int, ...]
    plain: tuple[int, ...]


class MixedSession:
    """A session over two streams; it is fed prompts that begin with ``lead.preferred``.

    ``fed`` counts the tokens that went through the model, of both streams.
    """

    def __init__(self, streams: Streams, lead: Lead, mixing: Mixing) -> None:
        self.streams, self.lead, self.mixing = streams, lead, mixing
        self.fed = 0
        self._begun = False

    @property
    def context(self) -> int | None:
        """Tokens of a prompt with the preference and its answer; the other stream may need a few more."""
        room = self.streams.context
        return None if room is None else room - max(0, len(self.lead.plain) - len(self.lead.preferred))

    def prefill(self, tokens: Sequence[int]) -> Logits:
        first, second = list(tokens), list(tokens)
        if not self._begun:
            length = len(self.lead.preferred)
            if tuple(first[:length]) != self.lead.preferred:
                raise UsageError("prompt", "does not begin with the preference", "put it into the system turn")
            second = [*self.lead.plain, *first[length:]]
        if self.mixing.strength == 0.0:
            second = []
        preferred, plain = self.streams.prefill(first, second)
        self._begun = True
        self.fed += len(first) + len(second)
        return self._mix(preferred, plain)

    def step(self, token: int) -> Logits:
        preferred, plain = self.streams.step(token)
        self.fed += 1 if plain is None else 2
        return self._mix(preferred, plain)

    def set_user(self, adapter: Path | None) -> None:
        self.streams.set_user(adapter)
        self._begun = False

    def reset(self) -> None:
        self.streams.reset()
        self._begun = False

    def prefer(self, lead: Lead, mixing: Mixing | None = None) -> None:
        """Another preference, or another strength. Empties the state."""
        self.reset()
        self.lead, self.mixing = lead, mixing or self.mixing

    def close(self) -> None:
        self.streams.close()

    def _mix(self, preferred: Logits, plain: Logits | None) -> Logits:
        return preferred if plain is None else mix(preferred, plain, self.mixing)


def mix(preferred: Logits, plain: Logits, mixing: Mixing) -> Logits:
    """Logits (V,) of both streams to those that are drawn from; a token that is not plausible gets minus infinity."""
    if mixing.strength == 0.0:
        return preferred
    mixed = np.full_like(preferred, -np.inf)
    kept = plausible_tokens(preferred, mixing)
    mixed[kept] = preferred[kept] + mixing.strength * (preferred[kept] - plain[kept])
    return mixed


def plausible_tokens(preferred: Logits, mixing: Mixing) -> npt.NDArray[np.int64]:
    """The smallest set of likeliest tokens that has the probability ``mixing.plausible``; of 1 all there are."""
    if mixing.plausible == 1.0:
        return np.arange(len(preferred))
    scaled = preferred.astype(np.float64) / mixing.temperature
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    # All tokens below (1 - p) / V together have less than 1 - p: the set is among the others, and few are to be sorted.
    candidates = np.flatnonzero(chances >= (1.0 - mixing.plausible) / len(chances))
    ordered = candidates[np.argsort(-chances[candidates], kind="stable")]
    reached = np.cumsum(chances[ordered])
    kept: npt.NDArray[np.int64] = ordered[reached - chances[ordered] < mixing.plausible]
    return kept


def system_text(preference: str, system: str = "") -> str:
    """The system turn that states a preference, after what the system turn says anyway."""
    return " ".join(part for part in (system.strip(), preference.strip()) if part)


def find_lead(tokenizer: Any, preference: str, system: str = "") -> Lead:
    """How prompts begin that state the preference in the system turn, and how they begin without it.

    Raises:
        InputError: the preference is empty or no text, or the model's template does not keep system turns apart.
    """
    if not preference.strip():
        raise InputError("preference", "is empty", "say what answers should be like")
    try:
        preference.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("preference", "is not UTF-8 text", "check the terminal's encoding") from error
    found = {_split(tokenizer, probe, system_text(preference, system), system.strip()) for probe in PROBES}
    if len(found) != 1 or (lead := found.pop()).preferred == lead.plain:
        reason = "the chat template of this model does not keep a system turn apart from the question"
        raise InputError("preference", reason, "use a model whose template has system turns")
    return lead


def _split(tokenizer: Any, probe: str, with_it: str, without: str) -> Lead:
    """Both beginnings of one question: everything before the longest ending that the two prompts share."""
    from edgealign.data.encode import encode_prompt

    asked = Message("user", probe)
    preferred, plain = (
        encode_prompt(tokenizer, (*([Message("system", text)] if text else []), asked), typed=True)
        for text in (with_it, without)
    )
    shared = 0
    while shared < min(len(preferred), len(plain)) and preferred[-1 - shared] == plain[-1 - shared]:
        shared += 1
    return Lead(preferred[: len(preferred) - shared], plain[: len(plain) - shared])
