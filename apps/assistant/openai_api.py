"""OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions.

    client = openai.OpenAI(base_url="http://127.0.0.1:8765/v1", api_key=TOKEN)
    client.chat.completions.create(model="starter", messages=[{"role": "user", "content": "Hello"}])

A user's adapter is a model, `base@user`. An answer depends on its request alone: the same seed gives the same text,
whoever asked before. Streams end with `data: [DONE]`; n answers come one after the other.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from assistant.engine import Engine
from assistant.faults import Fault
from assistant.openai_forms import ChatForm, CompletionForm, OpenAIForm, seeded
from assistant.pieces import Answer, Event, Job, Piece, Scored, bytes_of
from assistant.streams import EventStream, collect, first_of
from edgealign import __version__
from edgealign.runtimes.recipes import Sampling

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """How one kind of completion spells its answers. `delta` and `choice`: (index, ...) -> an entry of `choices`."""

    prefix: str
    object: str
    chunk: str
    delta: Callable[[int, Piece, int, bool], dict[str, Any]]
    choice: Callable[[int, Answer, list[Scored]], dict[str, Any]]


def routes(engine: Engine, default: Sampling) -> APIRouter:
    """The three endpoints over one engine; `default` is what a request leaves out."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    started = int(time.time())

    def card(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": started, "owned_by": "edgealign"}

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """The base model, and `base@user` for every user with an adapter."""
        return {"object": "list", "data": [card(model) for model in engine.models()]}

    @router.get("/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        """One model's card."""
        engine.user_of(model)
        return card(model)

    @router.post("/chat/completions", response_model=None)
    async def create_chat_completion(form: ChatForm, request: Request) -> Response:
        """An answer to a conversation."""
        form.check()
        user = engine.user_of(form.model)
        messages = [message.message() for message in form.messages]
        prompt = await asyncio.to_thread(engine.encode, messages)
        scored = (form.top_logprobs or 0) if form.logprobs else None
        schema = form.response_format.schema_wanted if form.response_format else None
        grammar = None if schema is None else await asyncio.to_thread(engine.grammar, schema)
        jobs = _jobs(engine, form, [prompt], default, form.wanted, user=user, top_logprobs=scored, grammar=grammar)
        return await _respond(engine, form, jobs, CHAT, request)

    @router.post("/completions", response_model=None)
    async def create_completion(form: CompletionForm, request: Request) -> Response:
        """Plain text continued, without a chat template."""
        form.check()
        user = engine.user_of(form.model)
        prompts = [await asyncio.to_thread(_ids, engine, prompt) for prompt in form.prompts]
        jobs = _jobs(
            engine, form, prompts, default, form.max_tokens, user=user, top_logprobs=form.logprobs, chat=False
        )
        return await _respond(engine, form, jobs, TEXT, request)

    return router


def room_for(engine: Engine, prompt: Sequence[int], wanted: int | None, usual: int, *, param: str) -> int:
    """How many tokens an answer may have.

    Raises:
        Fault: the prompt leaves no room, or not the room that was asked for.
    """
    room = engine.context - len(prompt)
    if room < max(1, wanted or 1):
        asked = f" and {wanted} of the answer" if wanted and room > 0 else ""
        raise Fault(
            400, f"this model's context is {engine.context} tokens; {len(prompt)} of the prompt{asked} do not fit",
            code="context_length_exceeded", param=param,
        )  # fmt: skip
    return min(room, wanted or usual)


def _jobs(
    engine: Engine, form: OpenAIForm, prompts: Sequence[tuple[int, ...]], default: Sampling, wanted: int | None,
    **options: Any,
) -> list[Job]:  # fmt: skip
    """One job for each choice, prompt by prompt."""
    jobs = []
    param = "messages" if isinstance(form, ChatForm) else "prompt"
    for prompt in prompts:
        if not prompt:
            raise Fault(400, "the prompt is empty", code="invalid_value", param=param)
        room = room_for(engine, prompt, wanted, default.max_tokens, param=param)
        sampling = form.sampling(default, max_tokens=room)
        jobs += [
            Job(prompt=prompt, sampling=seeded(sampling, number), stop=form.stops, **options)
            for number in range(form.n or 1)
        ]
    return jobs


async def _respond(engine: Engine, form: OpenAIForm, jobs: Sequence[Job], shape: Shape, request: Request) -> Response:
    """All choices in one body, or as a stream; what fails before the first token is an error with its status."""
    head = {
        "id": shape.prefix + secrets.token_hex(12), "created": int(time.time()), "model": form.model,
        "system_fingerprint": f"edgealign-{__version__}-{str(engine.facts.get('digest'))[:12]}",
    }  # fmt: skip
    if form.stream:
        with_usage = form.stream_options is not None and bool(form.stream_options.include_usage)
        events = _stream(engine, jobs, shape, head | {"object": shape.chunk}, with_usage)
        return EventStream(await first_of(events, request))
    choices, answers = [], []
    for index, job in enumerate(jobs):
        answer, tokens = await collect(engine.answer(job, admitted=index > 0), request)
        choices.append(shape.choice(index, answer, tokens))
        answers.append(answer)
    usage = _usage(jobs, answers, form.n or 1)
    return JSONResponse(head | {"object": shape.object, "choices": choices, "usage": usage})


async def _stream(
    engine: Engine, jobs: Sequence[Job], shape: Shape, head: Mapping[str, Any], with_usage: bool
) -> AsyncGenerator[str, None]:
    answers: list[Answer] = []
    empty = {"usage": None} if with_usage else {}
    for index, job in enumerate(jobs):
        place, first = 0, True
        async with aclosing(_with_start(engine.answer(job, admitted=index > 0))) as events:
            async for event in events:
                if isinstance(event, Piece):
                    entry = shape.delta(index, event, place, first)
                    place, first = place + len(event.text), False
                else:
                    answers.append(event)
                    entry = shape.delta(index, Piece(""), place, False) | {"finish_reason": event.finish}
                yield _event({**head, "choices": [entry], **empty})
    if with_usage:
        yield _event({**head, "choices": [], "usage": _usage(jobs, answers, len(jobs))})
    yield DONE


async def _with_start(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """An empty piece before the first one, once the model has begun: it carries the role."""
    first = True
    async with aclosing(events) as inner:
        async for event in inner:
            if first:
                yield Piece("")
            first = False
            yield event


def _ids(engine: Engine, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return engine.encode_text(prompt)
    vocabulary = len(engine.tokenizer)
    if not all(0 <= token < vocabulary for token in prompt):
        raise Fault(400, f"a token is outside the vocabulary of {vocabulary}", code="invalid_value", param="prompt")
    return tuple(prompt)


def _usage(jobs: Sequence[Job], answers: Sequence[Answer], n: int) -> dict[str, int]:
    """Prompts count once, however many answers they got."""
    prompt = sum(len(job.prompt) for job in jobs[::n])
    completion = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _chat_delta(index: int, piece: Piece, place: int, first: bool) -> dict[str, Any]:
    delta = ({"role": "assistant", "content": piece.text} if first else {"content": piece.text} if piece.text else {})
    return {"index": index, "delta": delta, "logprobs": _chat_logprobs(piece.tokens), "finish_reason": None}


def _chat_choice(index: int, answer: Answer, tokens: list[Scored]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    return {
        "index": index, "message": message, "logprobs": _chat_logprobs(tokens), "finish_reason": answer.finish,
    }  # fmt: skip


def _chat_logprobs(tokens: Sequence[Scored]) -> dict[str, Any] | None:
    if not tokens:
        return None
    entries = [
        {
            **_logprob(token.text, token.logprob),
            "top_logprobs": [_logprob(text, logprob) for text, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": entries, "refusal": None}


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": bytes_of(text)}


def _text_delta(index: int, piece: Piece, place: int, first: bool) -> dict[str, Any]:
    logprobs = _text_logprobs(piece.tokens, place)
    return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}


def _text_choice(index: int, answer: Answer, tokens: list[Scored]) -> dict[str, Any]:
    return {
        "index": index, "text": answer.text, "logprobs": _text_logprobs(tokens, 0), "finish_reason": answer.finish,
    }  # fmt: skip


def _text_logprobs(tokens: Sequence[Scored], place: int) -> dict[str, Any] | None:
    if not tokens:
        return None
    offsets = [place + sum(len(token.text) for token in tokens[:number]) for number in range(len(tokens))]
    return {
        "tokens": [token.text for token in tokens], "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens], "text_offset": offsets,
    }  # fmt: skip


CHAT = Shape("chatcmpl-", "chat.completion", "chat.completion.chunk", _chat_delta, _chat_choice)
TEXT = Shape("cmpl-", "text_completion", "text_completion", _text_delta, _text_choice)
