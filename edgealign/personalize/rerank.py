"""The best of several drawn answers, by any score; and the score that two prompts of one model give (REAR).

    found = best_of(session, prompt, 16, score=reward_of_tokens, sampling=sampling, stop={end})
    found = best_for_preference(session, plain, preferred, 16, sampling=sampling, stop={end})
    found[0].tokens                                                      # the answer

REAR asks how much better an answer fits the question with the preference than without it:

    sum log P(y | q) + weight * sum [log P(y | q, preference) - log P(y | q)]

It needs no reward model: two passes score an answer. Sums, not means, and the token that ends the turn counts.

Source: Zhang et al., REAR, arXiv 2606.30339, whose weight of 20 and 16 candidates are the defaults here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from edgealign.errors import UsageError
from edgealign.personalize.ranking import token_logprobs

if TYPE_CHECKING:
    from edgealign.runtimes.generate import LogitsHook
    from edgealign.runtimes.recipes import Sampling
    from edgealign.runtimes.session import Session

# An answer's tokens, with the one that ends the turn if it was drawn, to a number; larger is better.
Score: TypeAlias = Callable[[Sequence[int]], float]

REAR_WEIGHT = 20.0
REAR_CANDIDATES = 16


@dataclass(frozen=True)
class Candidate:
    """A drawn answer without the token that ends its turn, whether it ended, and its score."""

    tokens: tuple[int, ...]
    ended: bool
    score: float


def best_of(
    session: Session, prompt: Sequence[int], n: int, score: Score, *, sampling: Sampling, stop: Collection[int] = (),
    hooks: Sequence[Sequence[LogitsHook]] = (),
) -> list[Candidate]:
    """Draw ``n`` answers, score each different one once, return those best first (as drawn where scores are equal).

    Args:
        hooks: what each answer is drawn with; none: all are drawn plainly.

    Raises:
        UsageError: no candidates are asked for, all would be the same, or a score is not a number.
    """
    from edgealign.runtimes.generate import generate

    if n < 1:
        raise UsageError(n, "is no number of candidates", "draw at least one")
    if n > 1 and sampling.temperature == 0.0:
        raise UsageError("temperature 0", f"draws the same answer {n} times", "raise the temperature")
    drawn: dict[tuple[int, ...], bool] = {}
    for number in range(n):
        session.reset()
        own = replace(sampling, seed=sampling.seed + number)
        said = generate(session, prompt, sampling=own, stop=stop, hooks=hooks[number] if hooks else ())
        whole = said.tokens if said.stop_token is None else (*said.tokens, said.stop_token)
        drawn[whole] = said.stop_token is not None
    found = []
    for whole, ended in drawn.items():
        value = float(score(whole))
        if math.isnan(value):
            raise UsageError("score", f"is not a number for an answer of {len(whole)} tokens", "check what scores it")
        found.append(Candidate(whole[:-1] if ended else whole, ended, value))
    session.reset()
    return sorted(found, key=lambda each: -each.score)


def best_for_preference(
    session: Session, plain: Sequence[int], preferred: Sequence[int], n: int = REAR_CANDIDATES, *,
    sampling: Sampling, stop: Collection[int] = (), weight: float = REAR_WEIGHT,
) -> list[Candidate]:
    """REAR: answers drawn from the prompt with the preference, ranked by what the preference adds.

    Args:
        plain, preferred: the same question without and with the preference.
    """
    return best_of(
        session, preferred, n, lambda answer: rear_score(session, plain, preferred, answer, weight=weight),
        sampling=sampling, stop=stop,
    )  # fmt: skip


def rear_score(
    session: Session, plain: Sequence[int], preferred: Sequence[int], answer: Sequence[int], *,
    weight: float = REAR_WEIGHT,
) -> float:
    """What this file's docstring says, in nats; empties the state."""
    without = float(token_logprobs(session, plain, answer).sum())
    return without + weight * (float(token_logprobs(session, preferred, answer).sum()) - without)
