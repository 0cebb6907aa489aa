"""Length-controlled win rates on judges whose taste is known, and doom loops."""

from __future__ import annotations

import numpy as np
import pytest

from edgealign.errors import UsageError
from edgealign.evaluate.loops import is_doom_loop, repeated_share, repeats
from edgealign.evaluate.win_rate import fit, win_rate


def judged(theta: float, phi: float, *, count: int = 4000, longer: float = 30.0, seed: int = 0):
    """Verdicts of a judge that follows the model exactly, of answers that are `longer` on average."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(100 + longer, 25, count), rng.normal(100, 25, count)
    gap = ours - theirs
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(gap / gap.std()))))
    return (rng.random(count) < p).astype(float), ours, theirs


def test_a_judge_that_likes_length_only_is_seen_through():
    wins, ours, theirs = judged(0.0, 2.0)
    found = win_rate(wins, ours, theirs, resamples=200)
    assert found.raw > 0.65
    assert found.controlled_interval[0] < 0.5 < found.controlled_interval[1]
    assert found.slope == pytest.approx(2.0, abs=0.25)
    assert found.length_gap == pytest.approx(30.0, abs=2.0)


def test_a_judge_that_likes_the_answers_themselves_is_believed():
    wins, ours, theirs = judged(0.8, 0.0, longer=-20.0)
    found = win_rate(wins, ours, theirs, resamples=200)
    assert found.controlled == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.04)
    assert found.controlled_interval[0] > 0.5


def test_swapping_the_models_turns_the_win_rate_round():
    wins, ours, theirs = judged(0.5, 1.0)
    there = win_rate(wins, ours, theirs, resamples=10)
    back = win_rate(1 - wins, theirs, ours, resamples=10)
    assert back.controlled == pytest.approx(1 - there.controlled, abs=1e-9)
    assert back.slope == pytest.approx(there.slope, abs=1e-9)


def test_equal_lengths_leave_the_raw_rate_and_extremes_are_finite():
    wins = np.array([1.0, 0.0, 1.0, 1.0] * 250)
    assert win_rate(wins, [5] * 1000, [5] * 1000, resamples=10).controlled == pytest.approx(0.75, abs=0.01)
    theta, slope = fit(np.ones(50), np.linspace(-3, 3, 50))
    assert 0 < theta < 10
    assert abs(slope) < 10


def test_the_ridge_is_where_the_gradient_vanishes():
    wins, ours, theirs = judged(0.3, 0.7, count=200)
    gap = ours - theirs
    theta, phi = fit(wins, gap)
    length = np.tanh(gap / gap.std())
    p = 1 / (1 + np.exp(-(theta + phi * length)))
    assert (p - wins).sum() + 0.2 * theta == pytest.approx(0, abs=1e-8)
    assert ((p - wins) * length).sum() + 0.2 * phi == pytest.approx(0, abs=1e-8)


def test_verdicts_that_fit_no_answers_are_refused():
    with pytest.raises(UsageError, match="3 verdicts: do not fit 2 pairs"):
        win_rate([1, 0, 1], [3, 4], [1, 2])


def test_doom_loops():
    assert repeats("abababab", span=2) == 4
    assert is_doom_loop([1, 2, 3, 4] * 4)
    assert not is_doom_loop([1, 2, 3, 4] * 3)
    assert not is_doom_loop(range(100))
    assert repeats([1, 2]) == 0
    assert repeated_share([1, 2, 3, 4] * 4) == pytest.approx(1 - 4 / 13)
    assert repeated_share([]) == 0.0
