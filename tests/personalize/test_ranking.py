"""Ranking through a session: the mean log-probability of the answer, whoever computes the logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgealign.personalize.evaluate import interval
from edgealign.personalize.evaluate_recipe import EvaluateRecipe
from edgealign.personalize.ranking import Ranking, mean_logprob, rank_choices


class Counting:
    """A session over four tokens: after token t, token t + 1 has probability 0.7 and every other 0.1."""

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        return self.step(tokens[-1])

    def step(self, token: int) -> npt.NDArray[np.float32]:
        odds = np.full(4, 0.1, dtype=np.float32)
        odds[(token + 1) % 4] = 0.7
        return np.log(odds) + 3.0  # logits are known up to a constant

    def set_user(self, adapter: Path | None) -> None:
        raise AssertionError("ranking must not touch the user")

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_mean_logprob_is_the_hand_worked_one() -> None:
    value = mean_logprob(Counting(), [0], [1, 2, 0])
    assert value == pytest.approx((2 * np.log(0.7) + np.log(0.1)) / 3, abs=1e-6)


def test_longer_answers_are_not_ranked_down_for_their_length() -> None:
    ranking = rank_choices(Counting(), [([0], [1, 2, 3, 0, 1], [2]), ([0], [2], [1])])
    assert ranking.accuracy == 0.5
    assert ranking.margins[0] == pytest.approx(np.log(7), abs=1e-6)


def test_a_tie_counts_half() -> None:
    assert Ranking((0.0, 1.0)).accuracy == 0.75


def test_the_interval_covers_the_mean_and_shrinks_with_agreement() -> None:
    recipe = EvaluateRecipe()
    wide, narrow = interval([0.0, 2.0] * 6, recipe), interval([1.0] * 12, recipe)
    assert wide["low"] < wide["mean"] == 1.0 < wide["high"]
    assert narrow == {"mean": 1.0, "low": 1.0, "high": 1.0}
