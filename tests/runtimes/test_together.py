"""Many answers at once are the answers one at a time: prompts of any lengths, users, samplings, ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.errors import UsageError
from edgealign.runtimes import together
from edgealign.runtimes.generate import GREEDY, Generated, generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session
from edgealign.runtimes.together import Batched, generate_together
from edgealign.runtimes.torch_session import TorchSession

RNG = np.random.default_rng(0)
PROMPTS = [[int(token) for token in RNG.integers(3, 500, length)] for length in (40, 1, 2, 17, 3, 40, 9, 25)]
DRAWN = Sampling(temperature=1.0, min_p=0.0, repetition_penalty=1.1, max_tokens=24)
SAMPLINGS = [replace(DRAWN, seed=seed, max_tokens=12 + 2 * seed) for seed in range(len(PROMPTS) - 1)]
SAMPLINGS.append(replace(GREEDY, max_tokens=30))
STOP = frozenset(range(3, 30))


class OneByOne:
    """A session without rows, over one that has them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def prefill(self, tokens: Sequence[int]) -> Any:
        return self._session.prefill(tokens)

    def step(self, token: int) -> Any:
        return self._session.step(token)

    def set_user(self, adapter: Path | None) -> None:
        self._session.set_user(adapter)

    def reset(self) -> None:
        self._session.reset()

    def close(self) -> None:
        self._session.close()


def said(found: Sequence[Generated]) -> list[tuple[tuple[int, ...], str, int | None, int]]:
    return [(each.tokens, each.finish, each.stop_token, each.prompt_tokens) for each in found]


@pytest.mark.parametrize("rows", [32, 3])
@pytest.mark.parametrize("kind", ["base", "lora"])
def test_rows_say_what_single_prompts_say(
    tiny_model: Path, tiny_lora: Callable[..., Path], kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "ROWS", rows)
    session = TorchSession(tiny_model, threads=1)
    session.set_user(None if kind == "base" else tiny_lora(seed=3, strength=0.5))
    counted: list[int] = []
    found = generate_together(session, PROMPTS, SAMPLINGS, stop=STOP, on_answer=lambda: counted.append(1))
    alone = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
        session.reset()
        alone.append(generate(session, prompt, sampling=sampling, stop=STOP))
    assert said(found) == said(alone)
    assert {each.finish for each in found} == {"stop", "length"}
    assert len({len(each.tokens) for each in found}) > 2, "all rows ended together: leaving was not tested"
    assert len(counted) == len(PROMPTS)
    assert isinstance(session, Batched)
    assert not isinstance(OneByOne(session), Batched)
    assert said(generate_together(OneByOne(session), PROMPTS, SAMPLINGS, stop=STOP)) == said(alone)
    session.close()


@pytest.mark.parametrize("shape", ["tiny", "tiny-lfm3"])
def test_logits_of_rows_are_those_of_single_prompts(shape: str, tmp_path: Path) -> None:
    """Also where rows have left, and beyond LFM3's window of 32 tokens."""
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    create.run(InitRecipe(shape=shape, seed=1, vocab_size=512, dtype="float32"), text=[], out=tmp_path / "m")
    session = TorchSession(tmp_path / "m", threads=1)
    fed = {0: list(PROMPTS[0]), 1: list(PROMPTS[1]), 3: list(PROMPTS[3])}
    rows = session.rows(list(fed.values()))
    logits, active = rows.prefill(), list(fed)
    for step in range(40):
        for row, place in enumerate(active):
            alone = session.score(fed[place])[-1]
            assert np.abs(logits[row] - alone).max() < 1e-4, (step, place)
            assert alone.std() > 0.01
        if step == 20:
            active = [1, 3]
            rows.keep([1, 2])
        for place in active:
            fed[place].append(3 + (7 * step + place) % 400)
        logits = rows.step([fed[place][-1] for place in active])


def test_an_empty_prompt_and_a_foreign_token_are_refused(tiny_model: Path) -> None:
    session = TorchSession(tiny_model, threads=1)
    with pytest.raises(UsageError, match="is empty"):
        generate_together(session, [[5], []], [GREEDY, GREEDY])
    with pytest.raises(UsageError, match="outside the vocabulary"):
        generate_together(session, [[5], [512]], [GREEDY, GREEDY])
    assert generate_together(session, [], []) == []
