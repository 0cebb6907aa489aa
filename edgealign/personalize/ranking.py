"""How a session ranks a user's choices: by the mean log-probability of the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgealign.runtimes.session import Session, score

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Triple = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Ranking:
    """`margins`: mean log-probability of chosen minus rejected, in nats per token, one per choice."""

    margins: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of choices that are ranked as the user did; a tie counts half."""
        return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in self.margins) / len(self.margins)


def rank_choices(session: Session, choices: Sequence[Triple]) -> Ranking:
    """Score every (prompt, chosen, rejected) of token ids with the session's present user."""
    return Ranking(
        tuple(
            mean_logprob(session, prompt, chosen) - mean_logprob(session, prompt, rejected)
            for prompt, chosen, rejected in choices
        )
    )


def mean_logprob(session: Session, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Mean log-probability of the completion's tokens after the prompt, in nats per token."""
    return float(token_logprobs(session, prompt, completion).mean())


def token_logprobs(
    session: Session, prompt: Sequence[int], completion: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Log-probability of each of the completion's tokens after the prompt, in nats; empties the state."""
    import numpy as np

    tokens = [*prompt, *completion]
    logits = score(session, tokens[:-1])[len(prompt) - 1 :]
    return log_softmax(logits)[np.arange(len(completion)), list(completion)]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities of the last axis, in 64 bits."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
