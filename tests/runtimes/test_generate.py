"""One loop for every runtime: what is drawn, when it stops, what it reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import RecipeError, UsageError
from edgealign.runtimes.generate import GREEDY, Generated, distribution, draw, generate, penalise
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import open_session

PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0}


def test_greedy_follows_the_script_until_the_stop_token() -> None:
    session = ScriptedSession(script=[5, 9, 7, 2])
    made = generate(session, [1, 3], stop={2})
    assert made.tokens == (5, 9, 7)
    assert (made.finish, made.stop_token, made.prompt_tokens) == ("stop", 2, 2)
    assert made.ttft_s > 0
    assert made.decode_tok_per_s > 0


def test_the_limit_ends_it_and_the_last_token_is_not_fed() -> None:
    session = ScriptedSession(script=[5, 9, 7, 2])
    made = generate(session, [1, 3], sampling=Sampling(max_tokens=2, temperature=0.0, **PLAIN))
    assert made.tokens == (5, 9)
    assert made.finish == "length"
    assert session.tokens == [1, 3, 5]


def test_one_token_has_no_decode_speed() -> None:
    assert Generated((5,), "length", None, 2, 0.1, 0.0).decode_tok_per_s == 0.0


def test_a_callback_that_returns_false_cancels() -> None:
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return len(seen) < 2

    made = generate(ScriptedSession(script=[5, 9, 7]), [1], on_token=watch)
    assert made.finish == "cancelled"
    assert made.tokens == (5, 9) == tuple(seen)


def test_hooks_run_in_order_and_see_the_history() -> None:
    histories: list[tuple[int, ...]] = []

    def remember(history, logits):  # type: ignore[no-untyped-def]
        histories.append(tuple(history))
        return logits

    def only_eleven(history, logits):  # type: ignore[no-untyped-def]
        return np.where(np.arange(len(logits)) == 11, 0.0, -np.inf).astype(np.float32)

    made = generate(
        ScriptedSession(script=[5, 9]), [1, 3], hooks=[remember, only_eleven],
        sampling=Sampling(max_tokens=2, temperature=0.0, **PLAIN),
    )
    assert made.tokens == (11, 11)
    assert histories == [(1, 3), (1, 3, 11)]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        sampling = Sampling(max_tokens=30, temperature=1.0, seed=seed, **PLAIN)
        return generate(ScriptedSession(), [1], sampling=sampling).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    rng = np.random.default_rng(0)
    sampling = Sampling(temperature=1.0, **PLAIN)
    counts = np.bincount([draw(logits, [], sampling, rng) for _ in range(20_000)], minlength=3)
    assert np.abs(counts / 20_000 - [0.5, 0.3, 0.2]).max() < 0.015


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2},
        {"temperature": 0.4, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, {"top_p": 0.5, "min_p": 0.3},
        {"temperature": 2.0, "top_k": 1},
    ],
)  # fmt: skip
def test_filters_keep_what_transformers_keeps(settings: dict[str, float]) -> None:
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    sampling = Sampling(**{"temperature": 1.0, **PLAIN, **settings})  # type: ignore[arg-type]
    logits = np.random.default_rng(3).normal(0, 2, 100).astype(np.float32)
    scores = torch.tensor(logits)[None]
    for wanted, warper in (
        (True, TemperatureLogitsWarper(sampling.temperature)),
        (sampling.top_k > 0, TopKLogitsWarper(sampling.top_k or 1)),
        (sampling.top_p < 1, TopPLogitsWarper(sampling.top_p)),
        (sampling.min_p > 0, MinPLogitsWarper(sampling.min_p)),
    ):
        scores = warper(None, scores) if wanted else scores
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    kept, probabilities = distribution(logits, sampling)
    got = np.zeros(100)
    got[kept] = probabilities
    assert np.allclose(got, expected, atol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(3).normal(0, 2, 50).astype(np.float32)
    history = [4, 4, 9, 30, 31]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([history]), torch.tensor(logits)[None])[0].numpy()
    before = logits.copy()
    assert np.allclose(penalise(logits, history, 1.3), expected, atol=1e-6)
    assert np.array_equal(logits, before)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="prompt: is empty"):
        generate(ScriptedSession(), [], sampling=GREEDY)


def test_scripted_sessions_depend_on_every_token_and_on_the_user() -> None:
    session = open_session(Path("nothing"), runtime="scripted")
    base = session.prefill([1, 2, 3])
    session.reset()
    session.prefill([1, 2])
    assert np.array_equal(session.step(3), base)
    session.reset()
    assert not np.array_equal(session.prefill([2, 1, 3]), base)
    session.set_user(Path("ana"))
    assert not np.array_equal(session.prefill([1, 2, 3]), base)


def test_an_unknown_fault_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean crash"):
        ScriptedSession(fault="crahs")


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {}])
def test_a_token_that_a_hook_ruled_out_is_never_drawn(options: dict[str, float]) -> None:
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[4, 9]] = (0.5, 0.4)
    kept, probabilities = distribution(logits, Sampling(**{"temperature": 1.0, **PLAIN, **options}))
    assert set(kept.tolist()) <= {4, 9}
    assert probabilities.sum() == pytest.approx(1.0)
