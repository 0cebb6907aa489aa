"""Users with planted tastes who choose between a model's answers, and what a reward head makes of their choices.

The kinds of taste and the measures are those of planted.py; here the attributes are those of texts (traits.py) and the
features those of a model (features.py), so that the way from words to features is the real one.

Shape legend: A answers, J attributes, C components, U users, n pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgealign.errors import InputError
from edgealign.personalize.heads import Choices
from edgealign.personalize.planted import KINDS, SHARPNESS, Person

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.personalize.planted import Score

    Floats = npt.NDArray[np.float64]
    Whole = npt.NDArray[np.int64]

MOST_CHOICES = 32


@dataclass(frozen=True)
class Pool:
    """Answers: (A, C) features, (A, J) attributes, (A,) the number of the prompt."""

    features: Floats
    traits: Floats
    prompts: Whole

    def split(self, share: float, seed: int) -> tuple[Whole, Whole]:
        """Numbers of seen and unseen prompts.

        Raises:
            InputError: too few prompts for both.
        """
        numbers = np.random.default_rng(seed).permutation(np.unique(self.prompts))
        count = round(share * len(numbers))
        if not 0 < count < len(numbers):
            raise InputError(f"{len(numbers)} prompts", "cannot be split", "draw candidates for more prompts")
        return numbers[:count], numbers[count:]


@dataclass(frozen=True)
class TextUsers:
    """People of one population; `score` knows their tastes."""

    pool: Pool
    score: Score
    count: int

    @classmethod
    def draw(cls, pool: Pool, kind: str, count: int, *, seed: int, part: int) -> TextUsers:
        """Users of one `part` are the same people every time."""
        rng = np.random.default_rng([seed, part])
        return cls(pool, KINDS[kind](rng, count, pool.traits.shape[1]), count)

    def choose(
        self, prompts: Whole, pairs: int, *, seed: int, noiseless: bool = False, flips: float = 0.0
    ) -> tuple[Choices, Whole]:
        """Choices between random answers to random ones of these prompts, and the answers' numbers (U n, 2), chosen
        first."""
        rng = np.random.default_rng(seed)
        places = [np.flatnonzero(self.pool.prompts == prompt) for prompt in prompts]
        drawn = rng.integers(0, len(places), self.count * pairs)
        shown = np.stack([rng.choice(places[number], 2, replace=False) for number in drawn])  # (U n, 2)
        sides = self.pool.traits[shown].reshape(self.count, pairs, 2, -1)
        logit = SHARPNESS * self.score(sides[:, :, 0], sides[:, :, 1])
        first = logit > 0 if noiseless else rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
        first ^= rng.random(logit.shape) < flips
        shown = np.where(first.reshape(-1, 1), shown, shown[:, ::-1])
        who = np.repeat(np.arange(self.count), pairs)
        return Choices(self.pool.features[shown[:, 0]], self.pool.features[shown[:, 1]], who), shown

    def people(self, own_on: Whole, asked_on: Whole, *, asked: int, flips: float, seed: int) -> list[Person]:
        """Each user with choices on some prompts and noiseless held-out pairs on others."""
        own, _ = self.choose(own_on, MOST_CHOICES, seed=seed, flips=flips)
        held_out, _ = self.choose(asked_on, asked, seed=seed + 1, noiseless=True)
        return [Person(*both) for both in zip(own.by_user(), held_out.by_user(), strict=True)]

    def rewards(self, traits: Floats) -> Floats:
        """(U, A): what these answers are worth to each user, up to a constant; in deviations for a linear taste."""
        rows = np.broadcast_to(traits, (self.count, *traits.shape))
        return np.asarray(self.score(rows, np.zeros_like(rows)))


def mean_of_worst(values: Floats, share: float = 0.1) -> float:
    """Mean of the worst decile of users."""
    count = max(1, round(share * len(values)))
    return float(np.sort(values)[:count].mean())


def paired_gain(values: Floats, base: Floats, *, resamples: int, seed: int = 0) -> dict[str, float]:
    """Mean of values - base with its 95 % bootstrap interval over users."""
    gaps = values - base
    drawn = np.random.default_rng(seed).integers(0, len(gaps), (resamples, len(gaps)))
    low, high = np.quantile(gaps[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(gaps.mean()), "low": float(low), "high": float(high)}


def format_facts(text: str) -> Floats:
    """What a leak of serialisation would show in: blanks at the ends, doubled blanks, brackets, control characters."""
    return np.array([
        text[:1].isspace(), text[-1:].isspace(), "  " in text, text[:1] in "[{(\"'", text[-1:] in "]})\"'",
        "\\n" in text, any(not each.isprintable() and each != "\n" for each in text),
    ], dtype=np.float64)  # fmt: skip


def format_probe(texts: Sequence[str], shown: Whole, *, ridge: float = 0.1) -> float:
    """Accuracy on the second half of the pairs of a classifier that sees nothing of the answers but format."""
    from edgealign.judges.reward import fit

    facts = np.stack([format_facts(text) for text in texts])
    gaps = facts[shown[:, 0]] - facts[shown[:, 1]]
    half = len(gaps) // 2
    margins = gaps[half:] @ fit(gaps[:half], ridge)
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))
