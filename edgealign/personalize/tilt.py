"""From a user's few numbers to words: tilt the next token's distribution by what each token is worth to the user.

    hook = Tilt.of(basis, weights, strength=2.0)
    generate(session, prompt, hooks=[hook])

    pi'(t | context)  is proportional to  pi(t | context) exp(strength * r_t / (1 + n_t)),   r = tilt w     (V,)

n_t is how often t was said in the last 64 tokens, for what is liked; what is not liked stays so. Likings saturate: who
likes exclamation marks likes the tenth less than the first. Without it a strong tilt of one such person said nothing
else (benchmarks/carriers.py: -48 deviations of their taste at strength 2). And where an answer begins to repeat itself
the model speaks alone: what else it could say may be just what the user does not like.

One forward pass a token, as without it: a residual addition to the last state, for which logits are enough. Where a
reward is a sum over tokens this is the closed form of raising it at a price of KL (KL-regularised control; ARGS, arXiv
2402.01694, guides by rewards of whole continuations instead). `mean_kl_nats` says what was paid; `within_budget` scales
the strength until that is at most so much a token.

Shape legend: V vocabulary, B rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.errors import CheckFailed, UsageError
from edgealign.personalize.basis import OpenBasis
from edgealign.runtimes.generate import LogitsHook, generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Logits

    Floats = npt.NDArray[np.float64]

HALVINGS = 6
LATELY, SPAN = 64, 4  # tokens in which a repetition counts, and of which a repeated run is made
LONG = 64  # tokens after which an answer's length is disliked or liked half as much: ln(1 + n / LONG) grows so
SENTENCE_MARKS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f", "\u0964", "\u061f")  # and of other scripts
BEHIND_MARKS = " \n\t\"')]*_\u201d\u2019\u00bb"
SENTENCE_NATS = 4.0
# How far two answers to choose from are tilted apart. On the starter a choice between them teaches as much as one
# between the two of four plain answers that teach most (0.22 and 0.26, +- 0.04; two plain answers: 0.17). Measured
# before a tilt held itself back.
ASKING = 1.0


@dataclass(frozen=True)
class Tilt:
    """A hook for `generate`; `paid` collects the KL of each step, in nats."""

    rewards: npt.NDArray[np.float32]  # (V,)
    strength: float
    paid: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, basis: OpenBasis, weights: Floats, *, strength: float) -> Tilt:
        """Of one user.

        Raises:
            UsageError: a strength that is no number from 0 on.
        """
        if not np.isfinite(strength) or strength < 0:
            raise UsageError(f"strength {strength}", "is no number from 0 on", "0 leaves answers as they are")
        return cls((basis.tilt @ weights).astype(np.float32), strength)

    def __call__(self, history: Sequence[int], logits: Logits) -> Logits:
        if self.strength == 0 or repeats_itself(history):
            self.paid.append(0.0)
            return logits
        rewards = self.rewards if len(self.rewards) == len(logits) else self._padded(len(logits))
        tilted: Logits = logits + np.float32(self.strength) * rewards
        said, times = np.unique(np.asarray(history[-LATELY:], dtype=np.int64), return_counts=True)
        liked = np.maximum(rewards[said], 0)
        tilted[said] -= np.float32(self.strength) * liked * (times / (1 + times)).astype(np.float32)
        self.paid.append(kl_nats(tilted, logits))
        return tilted

    @property
    def mean_kl_nats(self) -> float:
        return float(np.mean(self.paid)) if self.paid else 0.0

    def _padded(self, size: int) -> npt.NDArray[np.float32]:
        """Some runtimes pad the vocabulary; nothing is said with those tokens."""
        return np.pad(self.rewards, (0, size - len(self.rewards)))


def repeats_itself(history: Sequence[int]) -> bool:
    """Whether the last tokens were said lately, in the same order."""
    recent = [int(token) for token in history[-LATELY:]]
    last = recent[-SPAN:]
    return len(last) == SPAN and any(recent[i : i + SPAN] == last for i in range(len(recent) - SPAN))


def whole(tilt: Tilt, ends: Sequence[int], closing: Collection[int] = ()) -> LogitsHook:
    """The tilt, but that an end is made likelier behind a sentence only: who wants it short wants whole sentences.

    There it may gain SENTENCE_NATS times the strength over the best other token: enough to end behind a sentence where
    the model itself may, and not behind "Dr.". Who wants it long gets longer answers, not endless ones: the n-th token
    is worth less than the first, so what an end loses falls as 1 / (1 + n / LONG).

    Args:
        closing: tokens that end a sentence (`sentence_ends`).
    """
    places, starts = list(ends), list[int]()

    def hook(history: Sequence[int], logits: Logits) -> Logits:
        starts[:] = starts or [len(history)]
        said = len(history) - starts[0]
        tilted = tilt(history, logits)
        lost = np.minimum(tilted[places] - logits[places], 0)
        if lost.any() and said:
            tilted = tilted.copy()
            tilted[places] -= (lost * (said / (said + LONG))).astype(np.float32)
            tilt.paid[-1] = kl_nats(tilted, logits)
        room = SENTENCE_NATS * tilt.strength if history and history[-1] in closing else 0.0
        # As far below the best other token as it was before, at least.
        most = np.delete(tilted, places).max() + logits[places] - np.delete(logits, places).max() + np.float32(room)
        if (tilted[places] > most).any():
            tilted = tilted.copy()
            tilted[places] = np.minimum(tilted[places], most)
            tilt.paid[-1] = kl_nats(tilted, logits)
        return tilted

    return hook


@lru_cache(maxsize=8)
def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """The tokens of a tokenizer whose text ends a sentence."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return frozenset(token for token, text in enumerate(texts) if text.rstrip(BEHIND_MARKS).endswith(SENTENCE_MARKS))


def apart(basis: OpenBasis, weights: Floats, covariance: Floats, *, strength: float) -> tuple[Tilt, Tilt]:
    """Two tilts on both sides of a user, in the direction that is known least: two answers to choose between.

    With weights w, their covariance S = R R' and the covariance T of what tokens are worth, R' T R has the main axis u:
    no other step of one posterior deviation changes what is said as much as R u. The two are strength w +- ASKING R u.

    Raises:
        UsageError: a strength that is not above 0.
    """
    if not strength > 0:
        raise UsageError(f"strength {strength}", "moves no answer", "choose one above 0")
    root = np.linalg.cholesky(covariance)
    worth = np.cov(basis.tilt, rowvar=False).reshape(len(weights), len(weights))
    step = (ASKING / strength) * root @ np.linalg.eigh(root.T @ worth @ root).eigenvectors[:, -1]
    one, other = (Tilt.of(basis, weights + side, strength=strength) for side in (step, -step))
    return one, other


def within_budget(
    tilt: Tilt, session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling, *, stop: Sequence[int],
    closing: Collection[int] = (), budget: float,
) -> tuple[Tilt, float]:  # fmt: skip
    """The tilt, halved until the mean KL over answers to these prompts is at most `budget` nats a token, and that KL.

    Raises:
        CheckFailed: even a 64th of it pays more.
    """
    for _ in range(HALVINGS + 1):
        tilt = replace(tilt, paid=[])
        for prompt in prompts:
            session.reset()
            generate(session, prompt, sampling=sampling, stop=stop, hooks=[whole(tilt, stop, closing)])
        if tilt.mean_kl_nats <= budget:
            return replace(tilt, paid=[]), tilt.mean_kl_nats
        tilt = replace(tilt, strength=tilt.strength / 2)
    reason = f"still pays {tilt.mean_kl_nats:.3g} nats a token of {budget:g}"
    raise CheckFailed(f"strength {2 * tilt.strength:g}", reason, "a larger budget, or best of n")


def kl_nats(tilted: Logits, base: Logits) -> float:
    """KL(tilted || base) of two rows of logits (V,)."""
    p, q = (_log_softmax(row.astype(np.float64)) for row in (tilted, base))
    return float((np.exp(p) * (p - q)).sum())


def _log_softmax(row: Floats) -> Floats:
    shifted = row - row.max()
    found: Floats = shifted - np.log(np.exp(shifted).sum())
    return found
