"""The best of n: drawn alike, scored once, best first; REAR's number by hand, and what its weight does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import UsageError
from edgealign.personalize.ranking import mean_logprob, token_logprobs
from edgealign.personalize.rerank import best_for_preference, best_of, rear_score
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import open_session

SAMPLING = Sampling(max_tokens=6, temperature=1.0, min_p=0.0, repetition_penalty=1.0, seed=4)
PLAIN, PREFERRED = (1, 5, 6), (1, 9, 9, 5, 6)
STOP = {2, 3, 4, 8}  # an eighth of the vocabulary: some answers end, some are cut


def test_the_answers_are_those_of_generate_and_the_best_is_first() -> None:
    def score(answer: Sequence[int]) -> float:
        return float(sum(answer))

    found = best_of(ScriptedSession(), PLAIN, 12, score, sampling=SAMPLING, stop=STOP)
    alone = []
    for seed in range(4, 16):
        said = generate(
            ScriptedSession(), PLAIN, stop=STOP,
            sampling=Sampling(max_tokens=6, temperature=1.0, min_p=0.0, repetition_penalty=1.0, seed=seed),
        )  # fmt: skip
        alone.append((said.tokens, said.stop_token))
    assert {each.tokens for each in found} == {tokens for tokens, _ in alone}
    assert [each.score for each in found] == sorted((float(sum(t) + (s or 0)) for t, s in set(alone)), reverse=True)
    assert {each.ended for each in found} == {True, False}
    assert found[0].score > found[-1].score


def test_a_score_may_use_the_session_itself() -> None:
    session = ScriptedSession()
    found = best_of(session, PLAIN, 5, lambda a: float(token_logprobs(session, PLAIN, a).sum()), sampling=SAMPLING)
    assert {each.tokens for each in found} == (
        {each.tokens for each in best_of(ScriptedSession(), PLAIN, 5, lambda a: 0.0, sampling=SAMPLING)}
    )
    assert session.tokens == []


def test_the_same_answer_is_scored_once() -> None:
    asked: list[Sequence[int]] = []
    session = ScriptedSession(script=[7, 2])
    found = best_of(session, PLAIN, 6, lambda answer: asked.append(answer) or 1.0, sampling=SAMPLING, stop={2})
    assert asked == [(7, 2)]
    assert [(each.tokens, each.ended) for each in found] == [((7,), True)]


def test_equal_scores_keep_the_order_of_drawing() -> None:
    found = best_of(ScriptedSession(), PLAIN, 6, lambda answer: 1.0, sampling=SAMPLING)
    first = generate(ScriptedSession(), PLAIN, sampling=SAMPLING).tokens
    assert found[0].tokens == first


def test_what_cannot_be_drawn_or_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="0: is no number of candidates"):
        best_of(ScriptedSession(), PLAIN, 0, lambda answer: 1.0, sampling=SAMPLING)
    greedy = Sampling(temperature=0.0)
    with pytest.raises(UsageError, match="temperature 0: draws the same answer 3 times"):
        best_of(ScriptedSession(), PLAIN, 3, lambda answer: 1.0, sampling=greedy)
    assert len(best_of(ScriptedSession(), PLAIN, 1, lambda answer: 1.0, sampling=greedy)) == 1
    with pytest.raises(UsageError, match="score: is not a number"):
        best_of(ScriptedSession(), PLAIN, 3, lambda answer: math.nan, sampling=SAMPLING)


def test_rear_by_hand() -> None:
    answer = (20, 21, 22)

    def by_hand(prompt: Sequence[int]) -> float:
        total, state = 0.0, list(prompt)
        for token in answer:
            session = ScriptedSession()
            logits = session.prefill(state).astype(np.float64)
            total += float(logits[token] - np.log(np.exp(logits).sum()))
            state.append(token)
        return total

    without, with_it = by_hand(PLAIN), by_hand(PREFERRED)
    session = ScriptedSession()
    assert rear_score(session, PLAIN, PREFERRED, answer) == pytest.approx(without + 20 * (with_it - without))
    assert rear_score(session, PLAIN, PREFERRED, answer, weight=0.0) == pytest.approx(without)
    assert rear_score(session, PLAIN, PREFERRED, answer, weight=1.0) == pytest.approx(with_it)
    assert mean_logprob(session, PLAIN, answer) == pytest.approx(without / 3)


def test_the_weight_decides_between_likely_and_preferred(tiny_model: Path) -> None:
    session = open_session(tiny_model, threads=1)
    sampling = Sampling(max_tokens=8, temperature=1.5, min_p=0.0, repetition_penalty=1.0)
    plain, preferred = (1, 40, 41, 42), (1, 300, 301, 302, 40, 41, 42)
    likely, wanted = (
        best_for_preference(session, plain, preferred, 8, sampling=sampling, weight=weight)[0].tokens
        for weight in (0.0, 1000.0)
    )

    def gain(answer: Sequence[int]) -> float:
        return float((token_logprobs(session, preferred, answer) - token_logprobs(session, plain, answer)).sum())

    assert likely != wanted
    assert gain(wanted) > gain(likely)
    assert token_logprobs(session, plain, likely).sum() > token_logprobs(session, plain, wanted).sum()
