"""Win rates of one model over another: raw, and with the length of the answers taken out (length-controlled).

The model of LC-AlpacaEval (arXiv 2404.04475) on one pair of models: with l the gap in length, in its own standard
deviations,

    logit P(ours wins) = theta + phi tanh(l),      length-controlled win rate = sigmoid(theta)

The published model has a term for the difficulty of each instruction, estimated over hundreds of models; with two
models it cannot be told from noise and is left out. Ties are half a win. Shape legend: N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgealign.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

RIDGE = 0.2  # on phi and theta, as in the published code; it holds a model that wins always away from infinity
STEPS, SMALL = 50, 1e-10


@dataclass(frozen=True)
class WinRate:
    """Shares from 0 to 1 with 95 % bootstrap intervals over prompts; `slope` is phi: above 0 the judge likes length."""

    raw: float
    raw_interval: tuple[float, float]
    controlled: float
    controlled_interval: tuple[float, float]
    slope: float
    length_gap: float  # mean of ours minus theirs, in the unit of the lengths given


def win_rate(
    wins: Sequence[float], ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> WinRate:
    """Compare two models on the same prompts.

    Args:
        wins: (N,) 1 where our answer was preferred, 0 where theirs was, 0.5 for a tie; or a probability.
        ours: (N,) lengths of our answers, in any unit.
        theirs: (N,) lengths of theirs.

    Raises:
        UsageError: the three differ in size, or there are fewer than two prompts.
    """
    won, gap = np.asarray(wins, dtype=np.float64), np.subtract(ours, theirs, dtype=np.float64)
    if not len(won) == len(gap) >= 2:
        raise UsageError(f"{len(won)} verdicts", f"do not fit {len(gap)} pairs of answers", "give two or more of each")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(won), (resamples, len(won)))
    theta, slope = fit(won, gap)
    raws = won[drawn].mean(-1)
    controlled = [_sigmoid(fit(won[places], gap[places])[0]) for places in drawn]
    return WinRate(
        float(won.mean()), _interval(raws), _sigmoid(theta), _interval(np.asarray(controlled)), slope,
        float(gap.mean()),
    )  # fmt: skip


def fit(wins: Floats, gap: Floats) -> tuple[float, float]:
    """theta and phi by penalised maximum likelihood (Newton). Equal lengths everywhere: phi is 0."""
    spread = float(gap.std())
    length = np.tanh(gap / spread) if spread > SMALL else np.zeros_like(gap)
    design = np.stack([np.ones_like(length), length], axis=1)  # (N, 2)
    weights = np.zeros(2)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (p - wins) + RIDGE * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if float(np.abs(step).max()) < SMALL:
            break
    return float(weights[0]), float(weights[1])


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
