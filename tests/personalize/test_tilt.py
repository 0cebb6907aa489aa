"""The next token tilted by its worth to a user: exact at 0, more and dearer with strength, within a budget."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import CheckFailed, UsageError
from edgealign.models.load import load_tokenizer
from edgealign.personalize.basis import OpenBasis, token_rewards
from edgealign.personalize.features import Features
from edgealign.personalize.lore import Basis
from edgealign.personalize.tilt import (
    SENTENCE_NATS,
    Tilt,
    kl_nats,
    repeats_itself,
    sentence_ends,
    whole,
    within_budget,
)
from edgealign.runtimes.generate import GREEDY, generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import open_session

PROMPT = (1, 9, 30, 44, 7)
WANTED = 77
SAMPLING = Sampling(temperature=1.0, min_p=0.0, max_tokens=40, seed=3)


def basis_of(tilt: np.ndarray) -> OpenBasis:
    """Nothing but a tilt."""
    return OpenBasis(None, tilt, "", "", np.zeros((tilt.shape[1] + 1, 0)), ())  # type: ignore[arg-type]


def likes(token: int, vocab: int = 512) -> OpenBasis:
    tilt = np.zeros((vocab, 1), dtype=np.float32)
    tilt[token] = 1.0
    return basis_of(tilt)


def test_strength_zero_leaves_every_answer_as_it_is(tiny_model: Path) -> None:
    with closing(open_session(tiny_model, threads=1)) as session:
        plain = generate(session, PROMPT, sampling=GREEDY, stop=())
        session.reset()
        tilted = generate(session, PROMPT, sampling=GREEDY, hooks=[Tilt.of(likes(WANTED), np.ones(1), strength=0.0)])
    assert tilted.tokens == plain.tokens


def test_a_wanted_token_comes_more_often_and_costs_more_with_strength_and_a_disliked_one_less(tiny_model: Path) -> None:
    counts, prices = [], []
    with closing(open_session(tiny_model, threads=1)) as session:
        for weight, strength in ((-1.0, 8.0), (1.0, 0.0), (1.0, 8.0), (1.0, 24.0)):
            tilt = Tilt.of(likes(WANTED), np.array([weight]), strength=strength)
            session.reset()
            counts.append(generate(session, PROMPT, sampling=SAMPLING, hooks=[tilt]).tokens.count(WANTED))
            prices.append(tilt.mean_kl_nats)
    assert counts[0] <= counts[1] < counts[2] < counts[3]
    assert prices[1] == 0.0 < prices[0] < prices[2] < prices[3]


def test_what_is_liked_is_liked_less_each_time_and_what_is_not_stays_so() -> None:
    rewards, plain = np.zeros(80, dtype=np.float32), np.zeros(80, dtype=np.float32)
    rewards[1:4] = 2.0, -2.0, 1.0
    for history, wanted in (
        ((), [2, -2, 1]), ((1,), [1, -2, 1]), ((1, 2, 0, 1, 2), [2 / 3, -2, 1]), ((1, *range(10, 74)), [2, -2, 1]),
        ((3, 10, 3, 11, 3, 12), [2, -2, 1 / 4]),
    ):  # fmt: skip
        np.testing.assert_allclose(Tilt(rewards, 1.0)(history, plain)[1:4], wanted, rtol=1e-5)
    assert not plain.any(), "the model's own logits are not changed"


def test_the_price_is_the_divergence_of_the_two_distributions() -> None:
    base, tilted = np.log(np.array([0.5, 0.25, 0.25])), np.log(np.array([0.25, 0.5, 0.25]))
    wanted = 0.25 * np.log(0.5) + 0.5 * np.log(2.0)
    assert kl_nats(tilted.astype(np.float32) + 3, base.astype(np.float32)) == pytest.approx(wanted, abs=1e-6)


def test_a_tilt_over_budget_is_scaled_back_and_then_refused(tiny_model: Path) -> None:
    tilt = Tilt.of(likes(WANTED), np.ones(1), strength=8.0)
    with closing(open_session(tiny_model, threads=1)) as session:
        kept, paid = within_budget(tilt, session, [PROMPT], SAMPLING, stop=(), budget=0.05)
        assert 0 < kept.strength < 8.0
        session.reset()
        generate(session, PROMPT, sampling=SAMPLING, hooks=[kept])
        assert kept.mean_kl_nats == pytest.approx(paid)
        assert paid <= 0.05
        with pytest.raises(CheckFailed, match=r"strength 0.125: still pays"):
            within_budget(tilt, session, [PROMPT], SAMPLING, stop=(), budget=1e-12)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_what_is_no_strength_is_refused(strength: float) -> None:
    with pytest.raises(UsageError, match="strength"):
        Tilt.of(likes(3), np.ones(1), strength=strength)


def test_a_padded_vocabulary_is_left_alone() -> None:
    tilt = Tilt.of(likes(2, vocab=4), np.ones(1), strength=1.0)
    np.testing.assert_array_equal(tilt([], np.zeros(6, dtype=np.float32)), [0, 0, 1, 0, 0, 0])


def test_token_rewards_find_the_tokens_that_a_reward_is_made_of() -> None:
    """Answers whose reward is the share of one token: that token is worth most."""
    rng = np.random.default_rng(0)
    source = Features(rng.normal(size=(40, 12)))
    answers = [rng.integers(0, 40, 15) for _ in range(400)]
    rows = [
        np.concatenate([np.zeros(24), source.embedding[tokens].mean(0), [np.log1p(len(tokens)), -1.0]])
        for tokens in answers
    ]
    features = np.stack(rows)
    direction = np.zeros((source.size, 1))
    direction[24:36, 0] = source.embedding[5]
    found = token_rewards(Basis(np.zeros(source.size), direction, np.ones(source.size)), features, source)
    assert found[:, 0].argmax() == 5


def test_behind_a_sentence_an_end_may_be_likelier_and_by_no_more_than_is_said() -> None:
    logits, ended, inside = np.zeros(24, dtype=np.float32), (3, 9), (9, 3)
    for reward, lead in ((-5.0, -5.0), (0.5, 0.5), (3.0, 3.0), (50.0, SENTENCE_NATS)):
        rewards = np.zeros(24, dtype=np.float32)
        rewards[7] = reward
        for strength in (0.5, 1.0, 2.0):
            behind = whole(Tilt(rewards, strength), [7], {9})(ended, logits)
            within = whole(Tilt(rewards, strength), [7], {9})(inside, logits)
            assert behind[7] - behind[0] == pytest.approx(strength * lead)
            assert within[7] - within[0] == pytest.approx(strength * min(reward, 0.0))


def test_who_wants_it_long_gets_no_endless_answer() -> None:
    rewards, logits = np.zeros(8000, dtype=np.float32), np.zeros(8000, dtype=np.float32)
    rewards[7] = -6.0
    hook = whole(Tilt(rewards, 1.0), [7])
    lost = [float(hook(tuple(range(8, 12 + said)), logits)[7]) for said in (0, 64, 192, 6400)]
    assert lost == pytest.approx([-6.0, -3.0, -1.5, -6 / 101], rel=1e-4)


@pytest.mark.parametrize(
    ("history", "again"),
    [((), False), ((1, 2, 3), False), ((1, 2, 3, 4), False), ((1, 2, 3, 4, 1, 2, 3, 4), True), ((5,) * 4, False),
     ((5,) * 5, True), ((1, 2, 3, 4, *range(10, 80), 1, 2, 3, 4), False), ((1, 2, 3, 4, 9, 1, 2, 3, 5), False)],
)  # fmt: skip
def test_where_an_answer_repeats_itself_the_model_speaks_alone(history: tuple[int, ...], again: bool) -> None:
    assert repeats_itself(history) is again
    tilt, logits = Tilt(np.ones(90, dtype=np.float32) * np.arange(90), 1.0), np.zeros(90, dtype=np.float32)
    assert np.array_equal(tilt(history, logits), logits) is again
    assert (tilt.paid[0] == 0.0) is again


def test_the_tokens_that_end_a_sentence_are_found_by_their_text() -> None:
    tokenizer = load_tokenizer("starter")
    found = sentence_ends(tokenizer)
    texts = {tokenizer.decode([token]) for token in found}
    assert {".", "!", "?"} <= texts
    assert all(any(mark in text for mark in ".!?") for text in texts)
    assert not {tokenizer.encode(each, add_special_tokens=False)[0] for each in (",", "a", ":", "\n", "-")} & found
