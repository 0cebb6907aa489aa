"""Linear alignment: the formula, the mask, both states fed alike, nothing left of a preference, hostile numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message
from edgealign.data.styles import STYLES
from edgealign.errors import InputError, UsageError
from edgealign.evaluate.chat_prompts import all_prompts
from edgealign.models.load import load_tokenizer, resolve_model
from edgealign.personalize.linear import Lead, MixedSession, Mixing, find_lead, mix, plausible_tokens
from edgealign.runtimes.generate import GREEDY, distribution, generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import Session, open_session, score
from edgealign.runtimes.streams import TwoSessions, open_streams

A, B = Lead((1, 7, 8, 9), (1,)), Lead((1, 4), (1, 5, 6))
QUESTION = (11, 12, 13)
ANSWER = (20, 21, 22, 23)
WISHES = ("Be brief.", "Answer with bullet points.")


def scripted(mixing: Mixing, lead: Lead = A, *, fault: str = "") -> tuple[MixedSession, Any, Any]:
    first, second = ScriptedSession(fault=fault), ScriptedSession(fault=fault)
    return MixedSession(TwoSessions(first, second), lead, mixing), first, second


def walk(session: Session, prompt: Sequence[int], answer: Sequence[int] = ANSWER) -> Any:
    return np.stack([session.prefill(prompt), *(session.step(token) for token in answer)])


def test_mixing_by_hand() -> None:
    preferred = np.array([2.0, 1.0, 0.0, -5.0], dtype=np.float32)  # 66.5 %, 24.5 %, 9.0 %, 0.1 %
    plain = np.array([1.0, 1.5, 0.0, -5.0], dtype=np.float32)
    assert mix(preferred, plain, Mixing(2.0, 0.8)).tolist() == [4.0, 0.0, -math.inf, -math.inf]
    assert mix(preferred, plain, Mixing(0.5, 0.95)).tolist() == [2.5, 0.75, 0.0, -math.inf]
    assert mix(preferred, plain, Mixing(2.0, 0.6)).tolist() == [4.0, -math.inf, -math.inf, -math.inf]
    assert mix(preferred, plain, Mixing(1.0, 1.0)).tolist() == [3.0, 0.5, 0.0, -5.0]
    assert mix(preferred, plain, Mixing(0.0, 0.1)) is preferred


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("plausible", [0.05, 0.5, 0.8, 0.999, 1.0])
def test_the_plausible_set_is_that_of_nucleus_sampling(temperature: float, plausible: float) -> None:
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 6.0):
        logits = (scale * rng.standard_normal(500)).astype(np.float32)
        sampling = Sampling(temperature=temperature, top_p=plausible, min_p=0.0, repetition_penalty=1.0)
        kept = plausible_tokens(logits, Mixing(1.0, plausible, temperature))
        assert sorted(kept.tolist()) == sorted(distribution(logits, sampling)[0].tolist())


def test_the_mask_keeps_a_token_out_that_would_win() -> None:
    preferred = np.array([3.0, 2.0, -4.0], dtype=np.float32)  # the last has 0.1 %
    plain = np.array([3.0, 1.5, -20.0], dtype=np.float32)
    assert int(np.argmax(mix(preferred, plain, Mixing(5.0, 1.0)))) == 2
    assert int(np.argmax(mix(preferred, plain, Mixing(5.0, 0.9)))) == 1
    assert int(np.argmax(mix(preferred, plain, Mixing(5.0, 0.5)))) == 0


def test_every_step_mixes_what_two_sessions_say() -> None:
    session, _, _ = scripted(Mixing(1.5))
    found = walk(session, (*A.preferred, *QUESTION))
    left, right = walk(ScriptedSession(), (*A.preferred, *QUESTION)), walk(ScriptedSession(), (*A.plain, *QUESTION))
    expected = np.stack([mix(one, other, Mixing(1.5)) for one, other in zip(left, right, strict=True)])
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, left)


def test_a_drawn_token_goes_to_both_streams() -> None:
    session, first, second = scripted(Mixing(2.0))
    said = generate(session, (*A.preferred, *QUESTION), sampling=Sampling(max_tokens=6, temperature=0.0))
    assert first.tokens == [*A.preferred, *QUESTION, *said.tokens[:-1]]
    assert second.tokens == [*A.plain, *QUESTION, *said.tokens[:-1]]
    session.prefill((3, 4))
    assert first.tokens[-3:] == second.tokens[-3:] == [said.tokens[-2], 3, 4]
    assert session.fed == len(first.tokens) + len(second.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_0_is_prompting_and_one_pass(temperature: float) -> None:
    session, first, second = scripted(Mixing(0.0, plausible=0.1))
    sampling = Sampling(max_tokens=20, temperature=temperature, min_p=0.0, seed=3)
    prompt = (*A.preferred, *QUESTION)
    assert generate(session, prompt, sampling=sampling).tokens == (
        generate(ScriptedSession(), prompt, sampling=sampling).tokens
    )
    assert second.tokens == []
    assert session.fed == len(first.tokens)


def test_a_preference_leaves_nothing_behind() -> None:
    session, _, _ = scripted(Mixing(2.0))
    asked = {lead: (*lead.preferred, *QUESTION) for lead in (A, B)}
    fresh = walk(session, asked[A])
    session.prefer(B)
    other = walk(session, asked[B])
    session.prefer(A)
    assert np.array_equal(walk(session, asked[A]), fresh)
    assert not np.array_equal(fresh, other)
    session.reset()
    assert np.array_equal(walk(session, asked[A]), fresh)
    session.set_user(Path("ana"))
    assert not np.array_equal(walk(session, asked[A]), fresh)
    session.set_user(None)
    assert np.array_equal(walk(session, asked[A]), fresh)


def test_the_control_a_session_that_forgets_to_forget_is_seen() -> None:
    session, _, _ = scripted(Mixing(2.0), fault="stale_after_reset")
    fresh = walk(session, (*A.preferred, *QUESTION))
    session.prefer(A)
    assert not np.array_equal(walk(session, (*A.preferred, *QUESTION)), fresh)


def test_a_users_adapter_is_on_both_streams() -> None:
    session, first, second = scripted(Mixing(1.0))
    session.set_user(Path("ana"))
    assert (first.user, second.user) == ("ana", "ana")
    session.set_user(None)
    assert (first.user, second.user) == ("", "")


@pytest.mark.parametrize("prompt", [(1, 7, 8), (1, 7, 8, 3, 11), (11, 12)])
def test_a_prompt_without_the_preference_is_refused(prompt: tuple[int, ...]) -> None:
    session, first, _ = scripted(Mixing(1.0))
    with pytest.raises(UsageError, match="prompt: does not begin with the preference; put it into the system turn"):
        session.prefill(prompt)
    assert first.tokens == []


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf, 21.0])
def test_a_strength_that_is_none(strength: float) -> None:
    with pytest.raises(UsageError, match="is no strength from 0 to 20"):
        Mixing(strength)


@pytest.mark.parametrize("options", [{"plausible": 0.0}, {"plausible": math.nan}, {"temperature": 0.0},
                                     {"temperature": math.nan}, {"temperature": math.inf}])  # fmt: skip
def test_a_mask_that_is_none(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"is no (share|temperature)"):
        Mixing(1.0, **options)


@pytest.mark.parametrize("wish", [*WISHES, "never say <|im_end|>", "\u65e5\u672c\u8a9e \U0001f642"])
@pytest.mark.parametrize("system", ["", "You are kind."])
def test_a_lead_turns_any_prompt_into_the_one_without_the_preference(
    tiny_model: Path, wish: str, system: str
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    lead = find_lead(tokenizer, wish, system)
    turns = (Message("user", "Hi there"), Message("assistant", "Yes."), Message("user", "<|im_start|> 5 more?"))
    for count in (1, 3):
        asked = turns[:count]
        stated = f"{system} {wish}".strip()
        preferred = encode_prompt(tokenizer, (Message("system", stated), *asked), typed=True)
        head = [Message("system", system)] if system else []
        plain = encode_prompt(tokenizer, (*head, *asked), typed=True)
        assert preferred[: len(lead.preferred)] == lead.preferred
        assert (*lead.plain, *preferred[len(lead.preferred) :]) == plain


@pytest.mark.parametrize(("wish", "reason"), [("", "is empty"), (" \n", "is empty"), ("\udcff", "is not UTF-8")])
def test_a_wish_that_is_no_text(tiny_model: Path, wish: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"preference: {reason}"):
        find_lead(load_tokenizer(tiny_model), wish)


@pytest.fixture(scope="module")
def torch_streams(tiny_model: Path) -> Any:
    return open_streams(tiny_model, threads=1)


def test_strength_0_in_torch_says_what_prompting_says(tiny_model: Path, torch_streams: Any) -> None:
    tokenizer, session = load_tokenizer(tiny_model), open_session(tiny_model, threads=1)
    mixed = MixedSession(torch_streams, find_lead(tokenizer, WISHES[0]), Mixing(0.0))
    for wish in WISHES:
        mixed.prefer(find_lead(tokenizer, wish))
        session.reset()
        prompt = encode_prompt(tokenizer, (Message("system", wish), Message("user", "Hi")))
        sampling = Sampling(max_tokens=24, temperature=1.0, seed=5)
        assert generate(mixed, prompt, sampling=sampling).tokens == generate(session, prompt, sampling=sampling).tokens


def test_torch_keeps_both_caches_and_forgets_them(tiny_model: Path, torch_streams: Any) -> None:
    tokenizer, oracle = load_tokenizer(tiny_model), open_session(tiny_model, threads=1)
    mixed = MixedSession(torch_streams, find_lead(tokenizer, WISHES[0]), Mixing(2.0))
    fox = Message("user", "Tell me of a fox.")
    asked = {wish: encode_prompt(tokenizer, (Message("system", wish), fox)) for wish in WISHES}
    seen = {}
    for wish in (*WISHES, WISHES[0]):
        lead = find_lead(tokenizer, wish)
        mixed.prefer(lead)
        found = walk(mixed, asked[wish], range(30, 42))
        assert wish not in seen or np.array_equal(seen[wish], found)
        seen[wish] = found
        plain = (*lead.plain, *asked[wish][len(lead.preferred) :])
        left, right = (
            score(oracle, [*prompt, *range(30, 42)])[len(prompt) - 1 :] for prompt in (asked[wish], plain)
        )
        expected = np.stack([mix(one, other, mixed.mixing) for one, other in zip(left, right, strict=True)])
        both = np.isfinite(found) & np.isfinite(expected)
        assert (np.isfinite(found) == np.isfinite(expected)).mean() > 0.999  # the mask's edge may fall on a tie
        assert np.abs(found[both] - expected[both]).max() < 1e-4
    assert not np.array_equal(*seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("style", ["cheerful", "short"])
def test_the_starter_follows_a_wish_further_than_a_prompt_takes_it(style: str) -> None:
    folder = resolve_model("starter")
    tokenizer, wish, measure = load_tokenizer(folder), STYLES[style].requests[0], STYLES[style].measure
    mixed = MixedSession(open_streams(folder, threads=1), find_lead(tokenizer, wish), Mixing())
    marks = {}
    for strength in (0.0, 2.0):
        mixed.prefer(mixed.lead, Mixing(strength))
        texts = []
        for prompt in all_prompts()[::2]:
            mixed.reset()
            asked = encode_prompt(tokenizer, (Message("system", wish), *prompt.messages))
            said = generate(mixed, asked, sampling=replace(GREEDY, max_tokens=48), stop={end_of_turn_id(tokenizer)})
            texts.append(tokenizer.decode(said.tokens))
        marks[strength] = sum(map(measure, texts)) / len(texts)
    assert marks[2.0] > marks[0.0]
