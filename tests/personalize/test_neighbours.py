"""Answers for tastes near a user's, the best of them by the user's own."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import UsageError
from edgealign.personalize.basis import OpenBasis, open_basis
from edgealign.personalize.embedding import rank_answers
from edgealign.personalize.neighbours import best_of_neighbours, neighbours
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import open_session

SAMPLING = Sampling(temperature=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=5, seed=3)
PROMPT = (1, 9, 30, 44, 7)


def angles(weights: np.ndarray, found: np.ndarray) -> np.ndarray:
    cosines = found @ weights / np.linalg.norm(weights) / np.linalg.norm(found, axis=1)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def test_neighbours_are_as_decided_and_near_and_the_user_is_the_first() -> None:
    weights = np.array([0.4, -1.2, 0.1, 2.0])
    found = neighbours(weights, 200, widest=25.0, seed=1)
    assert np.array_equal(found[0], weights)
    assert np.allclose(np.linalg.norm(found, axis=1), np.linalg.norm(weights))
    assert angles(weights, found).max() <= 25.0 + 1e-6
    assert angles(weights, found)[1:].min() > 0
    assert angles(weights, found).max() > 20
    assert np.linalg.matrix_rank(found) == 4, "they lie on all sides"


@pytest.mark.parametrize("weights", [np.zeros(3), np.array([1.5])])
def test_who_has_no_neighbours_is_asked_alone(weights: np.ndarray) -> None:
    assert np.array_equal(neighbours(weights, 3), np.tile(weights, (3, 1)))


@pytest.mark.parametrize(("count", "widest"), [(0, 30.0), (3, -1.0), (3, 91.0), (3, float("nan"))])
def test_what_is_no_neighbourhood_is_refused(count: int, widest: float) -> None:
    with pytest.raises(UsageError):
        neighbours(np.ones(3), count, widest=widest)


@pytest.fixture
def tilted(basis: Path) -> OpenBasis:
    return open_basis(basis)


def test_the_best_for_the_user_is_first_and_wide_neighbours_say_other_things(
    tiny_model: Path, tilted: OpenBasis
) -> None:
    weights = np.array([2.0, -1.0])
    with closing(open_session(tiny_model, threads=1)) as session:
        near, wide = (
            best_of_neighbours(tilted, weights, session, PROMPT, 6, strength=30.0, sampling=SAMPLING, stop={2},
                               widest=widest)
            for widest in (0.0, 90.0)
        )  # fmt: skip
        for found in (near, wide):
            whole = [(*each.tokens, 2) if each.ended else each.tokens for each in found]
            scores = rank_answers(tilted, weights, session, PROMPT, whole)
            assert np.allclose(scores, [each.score for each in found], atol=1e-4)
            assert list(scores) == sorted(scores, reverse=True)
    assert {each.tokens for each in near} != {each.tokens for each in wide}
