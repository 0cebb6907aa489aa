"""OpenAI's own client, unmodified, against a real server over a real model."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import openai
import pytest

from .conftest import TOKEN, USERS, Served

ASK: Any = [{"role": "user", "content": "Tell me of a fox."}]
FEW = {"max_tokens": 12, "temperature": 0}


def chat(served: Served, **options: Any) -> Any:
    return served.client.chat.completions.create(**{"model": served.model, "messages": ASK, **FEW, **options})


def complete(served: Served, **options: Any) -> Any:
    return served.client.completions.create(**{"model": served.model, "prompt": "A fox", **FEW, **options})


def test_models_lists_the_base_and_every_user(served: Served) -> None:
    listed = served.client.models.list().data
    assert [model.id for model in listed] == [served.model, *(f"{served.model}@{user}" for user in USERS)]
    assert {model.object for model in listed} == {"model"}
    assert {model.owned_by for model in listed} == {"edgealign"}


def test_one_model_is_retrieved_by_its_id(served: Served) -> None:
    assert served.client.models.retrieve(f"{served.model}@ana").id == f"{served.model}@ana"


def test_an_unknown_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_an_answer_has_openais_shape(served: Served) -> None:
    made = chat(served)
    assert made.object == "chat.completion"
    assert made.id.startswith("chatcmpl-")
    assert made.model == served.model
    assert made.system_fingerprint
    (choice,) = made.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content
    assert choice.logprobs is None
    assert made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12


def test_a_stream_says_what_the_whole_answer_says(served: Served) -> None:
    chunks = list(chat(served, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat(served).choices[0].message.content
    assert len(chunks) > 3


def test_a_stream_ends_with_usage_when_asked(served: Served) -> None:
    *_, last = chat(served, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == chat(served).usage


def test_stream_options_without_a_stream_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        chat(served, stream_options={"include_usage": True})


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.9}])
def test_the_same_seed_gives_the_same_answer_and_another_seed_another(served: Served, options: dict[str, Any]) -> None:
    def say(seed: int) -> str:
        return str(chat(served, seed=seed, extra_body={"min_p": 0.0}, **options).choices[0].message.content)

    assert say(7) == say(7)
    assert len({say(seed) for seed in range(4)}) > 1


def test_without_a_seed_answers_differ(served: Served) -> None:
    said = {chat(served, temperature=2, extra_body={"min_p": 0.0}).choices[0].message.content for _ in range(4)}
    assert len(said) > 1


def test_a_negative_seed_is_a_seed(served: Served) -> None:
    first, second = (chat(served, seed=-(2**63), temperature=1).choices[0].message.content for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 0.999999}}],
    ids=["top_p", "top_k", "min_p"],
)
def test_the_narrowest_filter_is_greedy(served: Served, options: dict[str, Any]) -> None:
    drawn = chat(served, temperature=1.0, seed=3, **options).choices[0].message.content
    assert drawn == chat(served).choices[0].message.content


def test_repetition_penalty_changes_the_answer(served: Served) -> None:
    plain = chat(served, extra_body={"repetition_penalty": 1.0}).choices[0].message.content
    assert chat(served, extra_body={"repetition_penalty": 5.0}).choices[0].message.content != plain


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_cuts_the_answer(served: Served, name: str) -> None:
    made = served.client.chat.completions.create(
        model=served.model, messages=ASK, temperature=0, **{name: 3}
    )
    assert made.usage.completion_tokens == 3
    assert made.choices[0].finish_reason == "length"


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(served: Served, as_list: bool, stream: bool) -> None:
    whole = str(chat(served, max_tokens=20).choices[0].message.content)
    stop = whole[8:11]
    made = chat(served, max_tokens=20, stop=[stop, "never said"] if as_list else stop, stream=stream)
    if stream:
        chunks = list(made)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        said, finish = made.choices[0].message.content, made.choices[0].finish_reason
    assert said == whole[: whole.index(stop)]
    assert finish == "stop"


def test_n_answers_are_those_of_consecutive_seeds(served: Served) -> None:
    options = {"temperature": 1.5, "extra_body": {"min_p": 0.0}}
    made = chat(served, n=3, seed=5, **options)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    alone = [chat(served, seed=seed, **options).choices[0].message.content for seed in (5, 6, 7)]
    assert [choice.message.content for choice in made.choices] == alone
    assert made.usage.completion_tokens > 12


def test_n_answers_stream_under_their_indices(served: Served) -> None:
    options = {"temperature": 1.5, "seed": 5, "n": 2, "extra_body": {"min_p": 0.0}}
    said = {0: "", 1: ""}
    for chunk in chat(served, stream=True, **options):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [said[0], said[1]] == [choice.message.content for choice in chat(served, **options).choices]


def test_logprobs_are_of_the_tokens_said_and_greedy_takes_the_best(served: Served) -> None:
    made = chat(served, logprobs=True, top_logprobs=5, extra_body={"repetition_penalty": 1.0}).choices[0]
    entries = made.logprobs.content
    assert len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 5
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        falling = [other.logprob for other in entry.top_logprobs]
        assert falling == sorted(falling, reverse=True)
        assert sum(math.exp(logprob) for logprob in falling) <= 1.0 + 1e-9
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_logprobs_without_alternatives(served: Served) -> None:
    entries = chat(served, logprobs=True).choices[0].logprobs.content
    assert len(entries) == 12
    assert all(entry.top_logprobs == [] for entry in entries)


def test_logprobs_stream_with_their_text(served: Served) -> None:
    streamed = []
    for chunk in chat(served, logprobs=True, top_logprobs=2, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == chat(served, logprobs=True, top_logprobs=2).choices[0].logprobs.content


def test_top_logprobs_needs_logprobs(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        chat(served, top_logprobs=2)


def test_a_users_adapter_is_a_model_and_changes_the_answer(served: Served) -> None:
    said = {
        user: chat(served, model=f"{served.model}{user}", max_tokens=24).choices[0].message.content
        for user in ("", "@ana", "@ben")
    }
    assert len(set(said.values())) == 3
    assert chat(served, max_tokens=24).choices[0].message.content == said[""]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_turn_is_read(served: Served, role: str) -> None:
    turns: Any = [{"role": role, "content": "Be brief."}, *ASK]
    made = chat(served, messages=turns)
    assert made.usage.prompt_tokens > chat(served).usage.prompt_tokens


def test_developer_means_system(served: Served) -> None:
    said = [
        chat(served, messages=[{"role": role, "content": "Be brief."}, *ASK]).choices[0].message.content
        for role in ("system", "developer")
    ]
    assert said[0] == said[1]


def test_several_turns_and_parts_of_text(served: Served) -> None:
    parts: Any = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "of a fox."}]
    said = chat(served, messages=[{"role": "user", "content": parts}])
    assert said.choices[0].message.content == chat(served).choices[0].message.content
    longer = chat(served, messages=[*ASK, {"role": "assistant", "content": "A fox."}, *ASK])
    assert longer.usage.prompt_tokens > said.usage.prompt_tokens


def test_a_special_token_that_is_typed_is_text(served: Served) -> None:
    typed = chat(served, messages=[{"role": "user", "content": "what is <|im_end|>?"}])
    plain = chat(served, messages=[{"role": "user", "content": "what is ?"}])
    assert typed.usage.prompt_tokens > plain.usage.prompt_tokens + 1


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": "Well"}]}, "messages"),
        ({"extra_body": {"min_p": 1.0}}, "min_p"),
        ({"extra_body": {"temprature": 1.0}}, "temprature"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served: Served, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served, **options)
    error = caught.value.body
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert str(error["param"]).startswith(param)
    assert error["type"] == "invalid_request_error"


def test_parameters_that_ask_for_nothing_are_accepted(served: Served) -> None:
    made = chat(
        served, user="someone", metadata={"a": "b"}, store=False, presence_penalty=0, frequency_penalty=0.0,
        logit_bias={}, response_format={"type": "text"}, n=1, stop=None, parallel_tool_calls=True,
    )  # fmt: skip
    assert made.choices[0].message.content == chat(served).choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_beyond_the_context_says_so(served: Served, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served, messages=[{"role": "user", "content": "fox " * 2000}], stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert str(served.engine.context) in caught.value.message


def test_more_tokens_than_the_context_has_room_for_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served, max_tokens=served.engine.context)
    assert caught.value.code == "context_length_exceeded"


def test_an_answer_ends_with_the_context(served: Served) -> None:
    used = chat(served).usage.prompt_tokens
    made = chat(served, max_tokens=served.engine.context - used, extra_body={"repetition_penalty": 1.0})
    assert made.usage.total_tokens <= served.engine.context


def test_a_wrong_token_is_refused(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=TOKEN + "x", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError) as caught:
            other.models.list()
        assert caught.value.code == "invalid_api_key"


def test_completions_continue_plain_text(served: Served) -> None:
    made = complete(served)
    assert made.object == "text_completion"
    assert made.id.startswith("cmpl-")
    assert made.choices[0].text
    assert made.choices[0].finish_reason == ("length" if made.usage.completion_tokens == 12 else "stop")


def test_completions_stream(served: Served) -> None:
    said = "".join(chunk.choices[0].text for chunk in complete(served, stream=True))
    assert said == complete(served).choices[0].text


def test_completions_of_several_prompts_and_of_token_ids(served: Served) -> None:
    made = complete(served, prompt=["A fox", "A hen"], n=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    alone = complete(served, prompt="A hen").choices[0].text
    assert {made.choices[2].text, made.choices[3].text} == {alone}
    ids = list(served.engine.encode_text("A fox"))
    assert complete(served, prompt=ids).choices[0].text == complete(served).choices[0].text
    assert complete(served, prompt=[ids, ids]).choices[1].text == complete(served).choices[0].text


def test_completions_logprobs_have_the_old_shape(served: Served) -> None:
    made = complete(served, logprobs=3)
    found = made.choices[0].logprobs
    sizes = {len(part) for part in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)}
    assert sizes == {made.usage.completion_tokens}
    assert "".join(found.tokens) == made.choices[0].text
    assert all(len(best) <= 3 for best in found.top_logprobs)
    assert found.text_offset[0] == 0


@pytest.mark.parametrize(
    "options", [{"prompt": [10**6]}, {"prompt": [-1]}, {"prompt": []}, {"echo": True}, {"best_of": 3}, {"suffix": "!"}]
)
def test_completions_refuse_what_they_cannot_do(served: Served, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(served, **options)


def test_the_asynchronous_client_in_parallel(served: Served) -> None:
    async def ask() -> list[str]:
        async with served.asynchronous() as client:
            async def one(model: str) -> str:
                made = await client.chat.completions.create(
                    model=model, messages=ASK, temperature=0, max_tokens=12
                )
                return str(made.choices[0].message.content)

            return await asyncio.gather(*(one(f"{served.model}{user}") for user in ("", "@ana", "@ben", "", "@ana")))

    base, ana, ben, base_again, ana_again = asyncio.run(ask())
    assert (base, ana) == (base_again, ana_again)
    assert len({base, ana, ben}) == 3


def test_raw_responses_are_json_and_events(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(model=served.model, messages=ASK, max_tokens=2)
    assert raw.headers["content-type"] == "application/json"
    with served.client.chat.completions.with_streaming_response.create(
        model=served.model, messages=ASK, max_tokens=2, stream=True
    ) as events:
        lines = [line for line in events.iter_lines() if line]
        assert events.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])
