"""Two streams in every native runtime: as two sessions, as one batch, mixed; nothing of a preference stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.errors import UsageError
from edgealign.personalize.linear import Lead, MixedSession, Mixing, mix
from edgealign.runtimes import llamacpp
from edgealign.runtimes.generate import generate
from edgealign.runtimes.llama_pair import LlamaPair
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import bundle_adapter, open_session, score
from edgealign.runtimes.streams import TwoSessions, open_streams

pytestmark = pytest.mark.runtime
EXACT: dict[str, Any] = {"threads": 1, "exact": True}
QUESTION = tuple(int(token) for token in np.random.default_rng(0).integers(9, 390, 24))
ANSWER = tuple(range(60, 84))
A, B = Lead((1, 6, 90, 91, 92, 93), (1,)), Lead((1, 6, 200, 201), (1, 6))
FINE = 1e-4


@pytest.fixture(scope="module", params=["gguf", "onnx", "executorch"])
def bundle(request: pytest.FixtureRequest) -> Path:
    """A 32-bit bundle of a tiny model for each runtime, with users ana and ben."""
    name, quant = {"gguf": ("tiny_bundle", "f32"), "onnx": ("onnx_bundle", "fp32"),
                   "executorch": ("executorch_bundle", "fp32")}[request.param]  # fmt: skip
    made: Path = request.getfixturevalue(name)(quant)
    return made


@pytest.fixture
def mixed(bundle: Path) -> Iterator[MixedSession]:
    with closing(MixedSession(open_streams(bundle, **EXACT), A, Mixing(2.0))) as session:
        yield session


def prompt(lead: Lead) -> tuple[int, ...]:
    return (*lead.preferred, *QUESTION)


def walk(session: Any, lead: Lead) -> Any:
    return np.stack([session.prefill(prompt(lead)), *(session.step(token) for token in ANSWER)])


def nearly(found: Any, expected: Any) -> bool:
    """Equal where both are finite; a few tokens at the mask's edge may be in one set and not in the other."""
    same = np.isfinite(found) == np.isfinite(expected)
    both = np.isfinite(found) & np.isfinite(expected)
    return bool(same.mean() > 0.999 and np.abs(found[both] - expected[both]).max() < FINE)


def test_strength_0_says_what_prompting_says(bundle: Path) -> None:
    with closing(MixedSession(open_streams(bundle, **EXACT), A, Mixing(0.0))) as mixed:
        sampling = Sampling(max_tokens=24, temperature=1.0, seed=2)
        found = generate(mixed, prompt(A), sampling=sampling).tokens
        assert mixed.fed == len(prompt(A)) + 23
    with closing(open_session(bundle, **EXACT)) as session:
        assert found == generate(session, prompt(A), sampling=sampling).tokens


def test_both_states_are_kept_token_by_token(bundle: Path, mixed: MixedSession) -> None:
    found = walk(mixed, A)
    with closing(open_session(bundle, **EXACT)) as session:
        left, right = (
            score(session, [*head, *QUESTION, *ANSWER])[len(head) + len(QUESTION) - 1 :]
            for head in (A.preferred, A.plain)
        )
    expected = np.stack([mix(one, other, Mixing(2.0)) for one, other in zip(left, right, strict=True)])
    assert nearly(found, expected)
    assert np.isneginf(found).any()
    assert not nearly(found, left)


def test_a_preference_leaves_nothing_behind(mixed: MixedSession) -> None:
    fresh = walk(mixed, A)
    mixed.prefer(B)
    other = walk(mixed, B)
    mixed.prefer(A)
    assert np.array_equal(walk(mixed, A), fresh)
    assert not np.array_equal(fresh, other)


def test_a_user_is_on_both_streams_and_leaves_nothing_behind(bundle: Path, mixed: MixedSession) -> None:
    fresh = walk(mixed, A)
    ana = bundle_adapter(bundle, "ana")
    mixed.set_user(ana)
    hers = walk(mixed, A)
    mixed.set_user(None)
    assert np.array_equal(walk(mixed, A), fresh)
    rows = []
    with closing(open_session(bundle, **EXACT)) as session:
        session.set_user(ana)
        for head in (A.preferred, A.plain):
            session.reset()
            rows.append(session.prefill((*head, *QUESTION)))
    assert nearly(hers[0], mix(rows[0], rows[1], Mixing(2.0)))
    assert not nearly(hers, fresh)


def test_a_conversation_goes_on_in_both_streams(mixed: MixedSession) -> None:
    whole = walk(mixed, A)[-1]
    mixed.reset()
    mixed.prefill(prompt(A))
    mixed.prefill(ANSWER[:10])
    assert nearly(mixed.prefill(ANSWER[10:]), whole)


@pytest.fixture
def pair(tiny_bundle: Callable[[str], Path]) -> Iterator[LlamaPair]:
    with closing(LlamaPair(tiny_bundle("f32"), **EXACT)) as opened:
        yield opened


def test_onnx_opens_the_model_once_and_states_stay_apart(onnx_bundle: Callable[[str], Path]) -> None:
    with (
        closing(open_streams(onnx_bundle("fp32"), **EXACT)) as two,
        closing(open_session(onnx_bundle("fp32"), **EXACT)) as alone,
    ):
        assert isinstance(two, TwoSessions)
        first, second = two.sessions
        assert first._session is second._session  # type: ignore[attr-defined]
        found = two.prefill(prompt(A), prompt(B))
        for logits, lead in zip(found, (A, B), strict=True):
            alone.reset()
            assert np.abs(logits - alone.prefill(prompt(lead))).max() < 1e-5
        first.close()
        assert np.isfinite(second.step(ANSWER[0])).all()  # it outlives the one that opened the model


def test_llama_cpp_steps_both_sequences_in_one_batch_and_agrees_with_two_sessions(
    tiny_bundle: Callable[[str], Path], pair: LlamaPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = pair.session._run
    monkeypatch.setattr(pair.session, "_run", lambda batch, count: (calls.append(count), run(batch, count)))
    assert type(open_streams(tiny_bundle("f32"), **EXACT)) is LlamaPair
    with closing(open_streams(tiny_bundle("f32"), one_batch=False, **EXACT)) as two:
        assert isinstance(two, TwoSessions)
        ours, theirs = pair.prefill(prompt(A), prompt(B)), two.prefill(prompt(A), prompt(B))
        calls.clear()
        for token in ANSWER:
            for one, other in zip(ours, theirs, strict=True):
                assert np.abs(one - other).max() < 1e-5
            ours, theirs = pair.step(token), two.step(token)
        assert calls == [2] * len(ANSWER)
        assert pair.context == two.context


def test_a_stream_that_is_left_out_costs_nothing_and_says_nothing(pair: LlamaPair) -> None:
    first, second = pair.prefill(prompt(A), ())
    assert second is None
    assert pair.step(70)[1] is None
    pair.reset()
    assert np.abs(pair.prefill(prompt(A), prompt(B))[0] - first).max() < 1e-5
    assert pair.step(70)[1] is not None


def test_each_stream_has_the_whole_context(
    tiny_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "BATCH", 16)  # prompts are fed in parts, too
    with closing(LlamaPair(tiny_bundle("f32"), context=40, **EXACT)) as pair:
        assert pair.context == 40
        tokens = (QUESTION * 2)[:39]
        pair.prefill(tokens, tokens[:20])
        pair.step(70)
        with pytest.raises(UsageError, match="41 tokens: do not fit the context of 40"):
            pair.step(70)
        pair.reset()
        with pytest.raises(UsageError, match="48 tokens: do not fit the context of 40"):
            pair.prefill(tokens, QUESTION * 2)
        with pytest.raises(UsageError, match="prompt: is empty"):
            pair.prefill((), tokens)
        pair.reset()
        assert pair.prefill(tokens, tokens)[1] is not None


def test_a_session_that_cannot_be_opened_twice_closes_the_first(
    tiny_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgealign.runtimes import streams

    opened: list[Any] = []

    def once(path: Path, **options: Any) -> Any:
        if opened:
            raise UsageError("memory", "is full")
        opened.append(open_session(path, **options))
        return opened[0]

    monkeypatch.setattr(streams, "open_session", once)
    with pytest.raises(UsageError, match="memory: is full"):
        open_streams(tiny_bundle("f32"), one_batch=False, **EXACT)
    assert opened[0]._context is None
