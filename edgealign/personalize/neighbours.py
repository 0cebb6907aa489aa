"""Ask the neighbours: answers drawn for tastes near a user's, the best of them by the user's own reward (RPS).

    found = best_of_neighbours(basis, weights, session, prompt, 5, strength=1.0, sampling=sampling, stop=stop)
    found[0].tokens

The user's own direction is where a model may be at its weakest; a neighbour's answer can serve better than the one that
was drawn for exactly this taste. The first answer is the user's own, every other one that of a direction within 30
degrees; all are judged by the user's reward, so it costs what best of n costs.

Source: Mao et al., Robust Preference Selection, arXiv 2510.20498: two stated dimensions and prompts there, a basis and
a tilt of the next token (tilt.py) here. Whether it beats best of n at equal budget: benchmarks/carriers.py.

Shape legend: n answers, B rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgealign.errors import UsageError
from edgealign.personalize.basis import OpenBasis
from edgealign.personalize.embedding import rank_answers
from edgealign.personalize.rerank import Candidate, best_of
from edgealign.personalize.tilt import Tilt, whole
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

WIDEST_DEGREES = 30.0


def neighbours(weights: Floats, count: int, *, widest: float = WIDEST_DEGREES, seed: int = 0) -> Floats:
    """(count, B): a user's weights first, then others of the same length at most `widest` degrees away.

    Raises:
        UsageError: a number of neighbours or an angle that cannot be.
    """
    if count < 1:
        raise UsageError(count, "is no number of neighbours", "ask at least one")
    if not 0 <= widest <= 90:
        raise UsageError(f"{widest:g} degrees", "is no neighbourhood", "choose from 0 to 90")
    length = float(np.linalg.norm(weights))
    if length == 0 or len(weights) == 1:  # nobody is near somebody without a taste, or on a line
        return np.tile(weights, (count, 1))
    rng = np.random.default_rng(seed)
    aside = rng.standard_normal((count, len(weights)))
    aside -= np.outer(aside @ weights, weights) / length**2
    aside *= length / np.linalg.norm(aside, axis=1, keepdims=True)
    angles = np.radians(widest) * rng.uniform(size=count)
    angles[0] = 0.0
    found: Floats = np.cos(angles)[:, None] * weights + np.sin(angles)[:, None] * aside
    return found


def best_of_neighbours(
    basis: OpenBasis, weights: Floats, session: Session, prompt: Sequence[int], n: int, *, strength: float,
    sampling: Sampling, stop: Collection[int], closing: Collection[int] = (), widest: float = WIDEST_DEGREES,
) -> list[Candidate]:  # fmt: skip
    """One answer for each of n neighbours, best first by the user's own reward; with `widest` 0 plain best of n.

    `closing`: tokens that end a sentence (`tilt.sentence_ends`).
    """
    near = neighbours(weights, n, widest=widest, seed=sampling.seed)
    ends = sorted(stop)
    hooks = [[whole(Tilt.of(basis, each, strength=strength), ends, closing)] for each in near]

    def reward(answer: Sequence[int]) -> float:
        return float(rank_answers(basis, weights, session, prompt, [answer])[0])

    return best_of(session, prompt, n, reward, sampling=sampling, stop=stop, hooks=hooks)
