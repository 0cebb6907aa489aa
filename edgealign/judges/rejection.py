"""Statistical rejection sampling (RSO, arXiv 2309.06657): from a model's samples to samples of the better policy.

The optimal policy of the KL-regularised problem is pi(y) exp(r(y) / beta) up to a constant; a sample y of pi is one of
it with probability exp((r(y) - r_max) / beta). RSO then learns from pairs of what is kept, with the hinge loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator


def accept(scores: Sequence[float], *, beta: float, count: int, rng: Generator) -> list[int]:
    """Places of `count` accepted samples (fewer where there are fewer); each round's r_max is of what is left.

    beta towards infinity keeps any, towards 0 the best only.
    """
    left, kept = list(range(len(scores))), list[int]()
    while left and len(kept) < count:
        best = max(scores[i] for i in left)
        taken = [i for i in left if rng.random() < np.exp((scores[i] - best) / beta)]
        kept += taken[: count - len(kept)]
        left = [i for i in left if i not in set(taken)]
    return kept
