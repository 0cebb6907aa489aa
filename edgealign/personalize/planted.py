"""People with planted tastes over frozen features, and how well a head knows them after k choices.

An answer has independent attributes; its features are a random mixture of them through tanh, with noise. A taste is a
score of two answers' attributes; a choice is drawn with probability sigmoid(SHARPNESS x score), held-out pairs are
without noise. Users of `draw` are new people of the same population, on new answers.

    positive-0.1, -1, -10    magnitudes ~ Dirichlet: all users like the same things, more or less alike (10: alike)
    signed-0.1, -1           and half of what a user has an opinion on, they dislike
    groups                   ten to one: the few want nearly the opposite
    targets                  as near as possible to one's own point: no direction is a taste
    circle                   a beats b beats c beats a; a fifth of the users go round the other way

Shape legend: U users, n pairs, J attributes, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edgealign.personalize.heads import Choices, Head, State

SHARPNESS, NOISE, OTHER_WAY = 4.0, 0.1, 0.2
KS = (0, 1, 2, 4, 8, 16, 32)
BOOTSTRAP = 2000
Array = npt.NDArray[np.float64]
Score = Callable[[Array, Array], Array]  # (U, n, J) of two answers -> (U, n)


@dataclass(frozen=True)
class Person:
    """What a new user chose, in order, and the pairs that they are asked about."""

    own: Choices
    held_out: Choices


@dataclass(frozen=True)
class Population:
    """A kind of taste over one random mixture of attributes."""

    kind: str
    seed: int = 0
    attributes: int = 8
    features: int = 64

    def draw(self, users: int, pairs: int, *, part: int, noiseless: bool = False) -> Choices:
        """`pairs` choices of each of `users` people; those of one `part` are the same people every time."""
        score = KINDS[self.kind](np.random.default_rng([self.seed, part]), users, self.attributes)
        rng = np.random.default_rng([self.seed, part, pairs, int(noiseless)])
        first, second = (rng.normal(size=(users, pairs, self.attributes)) for _ in range(2))
        logit = SHARPNESS * score(first, second)
        likes_first = logit > 0 if noiseless else rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
        sides = [self._features(answers, rng).reshape(users * pairs, -1) for answers in (first, second)]
        who = np.repeat(np.arange(users), pairs)
        return Choices(sides[0], sides[1], who).turned(~likes_first.ravel())

    def people(self, users: int, *, part: int, choices: int = max(KS), held_out: int = 200) -> list[Person]:
        """New users."""
        own = self.draw(users, choices, part=part).by_user()
        asked = self.draw(users, held_out, part=part, noiseless=True).by_user()
        return [Person(*both) for both in zip(own, asked, strict=True)]

    def _features(self, answers: Array, rng: np.random.Generator) -> Array:
        mixture = np.random.default_rng(self.seed).normal(size=(self.attributes, self.features))
        mixed: Array = np.tanh(answers @ mixture / self.attributes**0.5)
        return mixed + NOISE * rng.normal(size=mixed.shape)


def curve(head: Head, people: Sequence[Person], ks: Sequence[int] = KS) -> dict[int, Array]:
    """(U,) accuracy on each one's held-out pairs, by the number of own choices; a tie counts half."""
    found = {k: [accuracy(head, head.fit(person.own.take(slice(k))), person.held_out) for person in people] for k in ks}
    return {k: np.array(values) for k, values in found.items()}


def exchanged(people: Sequence[Person], step: int = 1) -> list[Person]:
    """Control: everybody's choices are those of somebody else, `step` places on."""
    return [Person(people[(place + step) % len(people)].own, person.held_out) for place, person in enumerate(people)]


def shuffled(people: Sequence[Person], seed: int = 0) -> list[Person]:
    """Control: labels by coin."""
    rng = np.random.default_rng(seed)
    return [Person(person.own.turned(rng.random(len(person.own)) < 0.5), person.held_out) for person in people]


def accuracy(head: Head, state: State, pairs: Choices) -> float:
    """Share of pairs that are ranked as the user did."""
    margins = head.margins(state, pairs)
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def band(values: Array, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over users."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAP, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _linear(rng: np.random.Generator, users: int, attributes: int, *, alpha: float, signed: bool) -> Score:
    tastes = rng.dirichlet(np.full(attributes, alpha), users)
    tastes = tastes * (rng.choice([-1.0, 1.0], tastes.shape) if signed else 1.0)
    return _along(tastes)


def _groups(rng: np.random.Generator, users: int, attributes: int) -> Score:
    """Everybody likes the second attribute; on the first, one in eleven has the other opinion."""
    tastes = np.zeros((users, attributes))
    tastes[:, 0] = np.where(np.arange(users) % 11 == 10, -1.0, 1.0)
    tastes[:, 1] = 0.5
    return _along(tastes)


def _along(tastes: Array) -> Score:
    unit = tastes / np.linalg.norm(tastes, axis=1, keepdims=True).clip(min=1e-12)
    return lambda first, second: np.asarray(np.einsum("unj,uj->un", first - second, unit))


def _targets(rng: np.random.Generator, users: int, attributes: int) -> Score:
    points = 1.5 * rng.normal(size=(users, 1, attributes))

    def score(first: Array, second: Array) -> Array:
        far = ((second - points) ** 2).sum(2) - ((first - points) ** 2).sum(2)
        return np.asarray(far / (2 * attributes**0.5))

    return score


def _circle(rng: np.random.Generator, users: int, attributes: int) -> Score:
    way = np.where(rng.random(users) < OTHER_WAY, -1.0, 1.0)[:, None]
    return lambda first, second: way * (first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0])


KINDS: Mapping[str, Callable[[np.random.Generator, int, int], Score]] = {
    "positive-0.1": partial(_linear, alpha=0.1, signed=False),
    "positive-1": partial(_linear, alpha=1.0, signed=False),
    "positive-10": partial(_linear, alpha=10.0, signed=False),
    "signed-0.1": partial(_linear, alpha=0.1, signed=True),
    "signed-1": partial(_linear, alpha=1.0, signed=True),
    "groups": _groups,
    "targets": _targets,
    "circle": _circle,
}
