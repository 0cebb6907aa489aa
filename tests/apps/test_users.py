"""No user sees another's state: interleaved requests equal cold runs, token for token; and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from assistant.engine import Engine, open_engine
from assistant.pieces import Job, Personal, Piece

from edgealign.personalize.tilt import Tilt, sentence_ends, whole
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import open_session, read_bundle

from .conftest import EngineMaker, Served, serving

GREEDY = Sampling(temperature=0.0, min_p=0.0, repetition_penalty=1.0, max_tokens=8)
SHARED = "Tell me of the fox and the hen, "  # prompts share their beginning, as conversations do
PROMPTS = tuple(SHARED + end for end in ("please.", "and of a bear.", "in short."))
Said = tuple[str | None, str, tuple[str, ...]]
Cold = dict[tuple[str | None, str], tuple[str, ...]]


def words(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    return tuple(tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens)


def interleave(served: Served, count: int, users: Sequence[str | None]) -> list[Said]:
    """`count` requests over HTTP in random order, eight at a time; (user, prompt, tokens)."""
    asked = [(users[number % len(users)], PROMPTS[number % len(PROMPTS)]) for number in range(count)]
    random.Random(1).shuffle(asked)

    async def run() -> list[Said]:
        gate = asyncio.Semaphore(8)
        async with served.asynchronous() as client:

            async def one(user: str | None, prompt: str) -> Said:
                async with gate:
                    made = await client.completions.create(
                        model=served.model if user is None else f"{served.model}@{user}", prompt=prompt,
                        temperature=0, max_tokens=GREEDY.max_tokens, logprobs=0,
                        extra_body={"repetition_penalty": 1.0},
                    )  # fmt: skip
                logprobs = made.choices[0].logprobs
                return user, prompt, tuple(logprobs.tokens or ()) if logprobs else ()

            return await asyncio.gather(*(one(*pair) for pair in asked))

    return asyncio.run(run())


def cold_runs(served: Served, open_cold: Callable[[str | None], Any], users: Sequence[str | None]) -> Cold:
    """Every user's answers from a session that has known no other user, emptied before each."""
    engine, found = served.engine, Cold()
    end = {engine._end, int(engine.tokenizer.eos_token_id)}
    for user in users:
        session, own = open_cold(user), engine.personal.get(user or "", Personal())
        for prompt in PROMPTS:
            session.reset()
            tilt = replace(own.tilt, paid=[]) if own.tilt else None
            hooks = [whole(tilt, sorted(end), sentence_ends(engine.tokenizer))] if tilt else []
            made = generate(session, engine.encode_text(prompt), sampling=GREEDY, stop=end, hooks=hooks)
            found[user, prompt] = words(engine.tokenizer, made.tokens)
        session.close()
    return found


def test_interleaved_requests_in_torch_equal_cold_runs(
    tiny_model: Path, tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"user{number}" for number in range(3)]
    adapters = {name: tiny_lora(seed=seed, strength=0.2) for seed, name in enumerate(names, start=1)}
    users = [None, *names]

    def open_cold(user: str | None) -> Any:
        session = open_session(tiny_model)
        session.set_user(adapters[user] if user else None)
        return session

    with serving(open_engine(tiny_model, adapters=adapters), tmp_path) as served:
        cold = cold_runs(served, open_cold, users)
        assert len(set(cold.values())) >= len(users)  # the users do say different things
        wrong = [one for one in interleave(served, 60, users) if cold[one[:2]] != one[2]]
    assert wrong == []


@pytest.fixture
def gguf_adapters(tiny_model: Path, tiny_lora: Callable[..., Path], tmp_path: Path) -> Callable[[int], dict[str, Path]]:
    """So many users' adapters in llama.cpp's format, by name."""

    def make(count: int) -> dict[str, Path]:
        from edgealign.models.load import read_config
        from edgealign.runtimes.gguf_adapter import write_lora_gguf

        found = {f"user{number}": tmp_path / f"user{number}.gguf" for number in range(count)}
        for seed, file in enumerate(found.values(), start=1):
            write_lora_gguf(tiny_lora(seed=seed, strength=0.2), file, base_config=read_config(tiny_model), dtype="f32")
        return found

    return make


@pytest.mark.runtime
@pytest.mark.parametrize(("count", "people"), [(60, 2), pytest.param(1000, 8, marks=pytest.mark.slow)])
def test_interleaved_requests_in_llama_cpp_equal_cold_runs(
    count: int, people: int, tiny_bundle: Callable[[str], Path], gguf_adapters: Callable[[int], dict[str, Path]],
    tmp_path: Path,
) -> None:  # fmt: skip
    bundle, adapters = read_bundle(tiny_bundle("f32")), gguf_adapters(people)
    engine = open_engine(bundle.path, adapters=adapters)
    words_known, draw = len(engine.tokenizer), np.random.default_rng(0)
    for number in range(people // 2):  # and people whose taste tilts the next token
        tilt = Tilt(draw.normal(size=words_known).astype(np.float32), 2.0)
        engine.personal[f"tilted{number}"] = Personal(tilt=tilt)
    users = [None, *adapters, *engine.personal]

    def open_cold(user: str | None) -> Any:
        session = open_session(bundle.path)
        session.set_user(adapters.get(user or ""))
        return session

    with serving(engine, tmp_path) as served:
        cold = cold_runs(served, open_cold, users)
        assert len(set(cold.values())) >= len(users)
        wrong = [one for one in interleave(served, count, users) if cold[one[:2]] != one[2]]
    assert wrong == []


@pytest.mark.parametrize("fault", ["", "stale_after_swap", "stale_after_reset", "ignored_adapter"])
def test_a_session_that_mixes_users_is_found_out(fault: str, scripted: EngineMaker, tmp_path: Path) -> None:
    """The control: the comparison above fails where it must."""
    users = [None, "u1", "u2"]
    with serving(scripted(ScriptedSession(vocab=4096, fault=fault), users=["u1", "u2"], queue=100), tmp_path) as served:

        def open_cold(user: str | None) -> Any:
            session = ScriptedSession(vocab=4096)
            session.set_user(Path(user) if user else None)
            return session

        cold = cold_runs(served, open_cold, users)
        wrong = [one for one in interleave(served, 30, users) if cold[one[:2]] != one[2]]
    assert bool(wrong) == bool(fault)


@pytest.fixture
def text_of() -> Iterator[Callable[[Engine, Job], str]]:
    """`text_of(engine, job)`: its answer, all in one event loop, as in a server."""
    with asyncio.Runner() as runner:

        async def answer(engine: Engine, job: Job) -> str:
            return "".join([event.text async for event in engine.answer(job) if isinstance(event, Piece)])

        yield lambda engine, job: runner.run(answer(engine, job))


def test_a_kept_state_is_continued_for_the_same_user_only(
    scripted: EngineMaker, text_of: Callable[[Engine, Job], str]
) -> None:
    session = ScriptedSession(vocab=4096)
    engine = scripted(session, users=["u1", "u2"])
    first = engine.encode_text(SHARED)
    text_of(engine, Job(prompt=first, sampling=GREEDY, user="u1"))
    fed = list(session.tokens)
    assert fed[: len(first)] == list(first)
    following = (*fed, *engine.encode_text(PROMPTS[1]))
    calls = session.calls
    kept = text_of(engine, Job(prompt=following, sampling=GREEDY, user="u1", keep=True))
    assert session.calls > calls  # the state was not emptied
    cold = text_of(engine, Job(prompt=following, sampling=GREEDY, user="u1"))
    other = text_of(engine, Job(prompt=following, sampling=GREEDY, user="u2", keep=True))
    assert kept == cold
    assert session.tokens[: len(following)] == list(following)
    assert other != cold
    engine.close()


def test_memory_and_files_stay_flat_over_swaps_in_torch(
    tiny_model: Path, tiny_lora: Callable[..., Path], text_of: Callable[[Engine, Job], str]
) -> None:
    adapters = {f"user{seed}": tiny_lora(seed=seed) for seed in range(3)}
    check_flat(open_engine(tiny_model, adapters=adapters), adapters, 40, text_of)


@pytest.mark.runtime
@pytest.mark.slow
def test_memory_and_files_stay_flat_over_a_thousand_swaps_in_llama_cpp(
    tiny_bundle: Callable[[str], Path], gguf_adapters: Callable[[int], dict[str, Path]],
    text_of: Callable[[Engine, Job], str],
) -> None:  # fmt: skip
    adapters = gguf_adapters(20)  # more than the runtime keeps: they are freed and read again
    check_flat(open_engine(tiny_bundle("f32"), adapters=adapters), adapters, 1000, text_of)


def check_flat(
    engine: Engine, adapters: dict[str, Path], count: int, text_of: Callable[[Engine, Job], str]
) -> None:
    many = len(adapters)
    child: Any = engine._session
    process = psutil.Process(child._child.pid)
    prompt, names = engine.encode_text("A fox"), list(adapters)

    def swap(times: int) -> None:
        for number in range(times):
            text_of(engine, Job(prompt=prompt, sampling=GREEDY, user=names[number % many]))

    swap(max(many, 30))  # the allocator's first growth
    before, files = process.memory_info().rss, process.num_fds()
    swap(count)
    grown = process.memory_info().rss - before
    assert process.num_fds() == files
    engine.close()
    assert grown <= 16 << 20
