"""Answers to stored questions: what the model is shown, what is stored of it, and two answers to choose from."""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastapi import Request

from assistant import conversations, preferences
from assistant.conversations import Json
from assistant.engine import Engine
from assistant.faults import Fault
from assistant.forms import DEFAULT_USER, AnswerForm, CompareForm
from assistant.openai_forms import SampledForm, seeded
from assistant.pieces import Answer, Job, Personal, Piece
from assistant.preferences import Chosen
from assistant.store import Store
from assistant.streams import unless_gone
from assistant.tastes import Tastes
from edgealign.chat.conversation import fit_prompt
from edgealign.chat.recipes import TalkRecipe
from edgealign.data.forms import Message
from edgealign.runtimes.recipes import Sampling

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
LIVELY = 0.9  # the least temperature of a comparison: two answers that say the same teach nothing
TRIES = 3  # answers that are drawn for a side until one says something, and something else than the other side


@dataclass(frozen=True)
class Question:
    """A stored question, ready to be answered."""

    message: str
    conversation: Json
    prompt: tuple[int, ...]
    dropped: int
    room: int


class Answerer:
    """Over one engine and one store; `default` is how tokens are drawn where neither request nor settings say it."""

    def __init__(self, engine: Engine, store: Store, default: TalkRecipe, tastes: Tastes) -> None:
        self.engine, self.store, self.default, self.tastes = engine, store, default, tastes

    def settings(self) -> Json:
        """Every setting as it is in force."""
        own = {name: getattr(self.default, name) for name in SAMPLED}
        page = {"user": DEFAULT_USER, "system": self.default.system, "theme": "system", "compare_every": 8}
        return {**page, **own, **preferences.settings(self.store)}

    async def answer(self, message: str, form: AnswerForm) -> AsyncGenerator[str, None]:
        """The events of one answer. If nobody listens any longer, what was said is stored all the same.

        Raises:
            Fault: no such question, no such model, no room, no place in the queue.
        """
        question, sampling = await asyncio.to_thread(self._prepare, message, form)
        model = self._model(question, form.model)
        job = self._job(question, sampling, model)
        key, said, done = uuid.uuid4().hex, "", False
        try:
            async with aclosing(self.engine.answer(job)) as events:
                begun = False
                async for event in events:
                    if not begun:
                        yield _event({"type": "start", "message": key})
                        begun = True
                    if isinstance(event, Piece):
                        said += event.text
                        if event.text:
                            yield _event({"type": "token", "text": event.text})
                        continue
                    done = True
                    storing = asyncio.to_thread(self._store, question, event, job, model, key)
                    stored = await asyncio.shield(storing)  # also if the page leaves just now
                    yield _event({"type": "answer", "message": stored, "dropped": question.dropped})
        finally:
            if said and not done:
                cut = Answer(said, "cancelled", len(job.prompt), 0, 0.0, 0.0)
                # Nothing can be awaited here: the task is being cancelled.
                asyncio.get_running_loop().run_in_executor(None, self._store_cut, question, cut, job, model, key)

    async def answer_whole(self, message: str, form: AnswerForm, request: Request) -> Json:
        """One answer, stored, in one piece."""
        events = self.answer(message, form)

        async def last() -> Json:
            found: Json = {}
            async with aclosing(events) as inner:
                async for event in inner:
                    found = json.loads(event.removeprefix("data: "))
            stored: Json = found["message"]
            return stored

        return await unless_gone(last(), request)

    async def compare(self, message: str, form: CompareForm) -> AsyncGenerator[str, None]:
        """The events of two answers; both are stored when both are there, and the first one if the second never comes.

        Of one model and a user who can be learned, the two are drawn on both sides of what is known (`Tastes.probe`): a
        choice between them teaches more than one between two seeds, and no third answer is drawn that nobody sees. A
        side that is empty, or says what the other does, is drawn again; where there are still not two, the end is that
        of one answer.

        Raises:
            Fault: as for `answer`.
        """
        question, sampling = await asyncio.to_thread(self._prepare, message, form)
        if form.temperature is None:
            sampling = replace(sampling, temperature=max(sampling.temperature, LIVELY))
        models = [self._model(question, model) for model in form.models or (None, None)]
        asking = None if form.models else await asyncio.to_thread(self.tastes.probe, question.conversation["user"])
        sides: list[Personal | None] = [*asking] if asking else [None, None]
        if secrets.randbelow(2):  # the place says nothing
            models.reverse()
            sides.reverse()
        made: list[tuple[Answer, Job, str]] = []
        begun = done = False
        try:
            for number, (side, model) in enumerate(zip(("left", "right"), models, strict=True)):
                for attempt in range(TRIES):
                    if attempt:
                        yield _event({"type": "again", "side": side})  # its text so far is to be taken back
                    job = self._job(question, seeded(sampling, number + 2 * attempt), model, sides[number])
                    async with aclosing(self.engine.answer(job, admitted=begun)) as events:
                        async for event in events:
                            if not begun:  # from here on an error is an event
                                yield _event({"type": "start"})
                                begun = True
                            if isinstance(event, Answer):
                                answer = event
                            elif event.text:
                                yield _event({"type": "token", "side": side, "text": event.text})
                    said = answer.text.strip()
                    if said and (not made or said != made[0][0].text.strip()):
                        made.append((answer, job, model))
                        break
            done = True
            if len(made) == 2:
                shown, chosen = await asyncio.to_thread(self._store_pair, question, made)
                self.tastes.shown(chosen)
            else:
                only = made[0] if made else (answer, job, model)
                stored = await asyncio.to_thread(self._store, question, *only, None)
                shown = {"type": "answer", "message": stored, "dropped": question.dropped}
            yield _event(shown)
        finally:
            if made and not done:
                # Nothing can be awaited here: the task may be being cancelled.
                asyncio.get_running_loop().run_in_executor(None, self._store_cut, question, *made[0], None)

    def _prepare(self, message: str, form: SampledForm) -> tuple[Question, Sampling]:
        talk, turns = conversations.path_to(self.store, message)
        if turns[-1]["role"] != "user":
            raise Fault(400, "this message is an answer; give the question above it", code="invalid_value")
        known = self.settings()
        default: Sampling = replace(self.default, **{name: known[name] for name in SAMPLED})
        sampling = form.sampling(default, max_tokens=form.max_tokens or default.max_tokens)
        head = [Message("system", talk["system"])] if talk["system"] else []
        said = [Message(turn["role"], turn["content"]) for turn in turns]
        pairs = zip(said[:-1:2], said[1::2], strict=True)
        # A template may know no empty answer.
        heard = [part for pair in pairs if pair[1].content.strip() for part in pair]
        prompt, dropped = fit_prompt(
            self.engine.encode, head, heard, said[-1], max_tokens=sampling.max_tokens, context=self.engine.context
        )
        room = min(sampling.max_tokens, self.engine.context - len(prompt))
        return Question(message, talk, tuple(prompt), dropped, room), sampling

    def _model(self, question: Question, wanted: str | None) -> str:
        """The wanted model, or the one of the conversation's user, or the base.

        Raises:
            Fault: no such model.
        """
        if wanted is not None:
            self.engine.user_of(wanted)
            return wanted
        own = f"{self.engine.name}@{question.conversation['user']}"
        return own if own in self.engine.models() else self.engine.name

    def _job(self, question: Question, sampling: Sampling, model: str, personal: Personal | None = None) -> Job:
        sampling = replace(sampling, max_tokens=question.room)
        user = self.engine.user_of(model)
        return Job(prompt=question.prompt, sampling=sampling, user=user, personal=personal, keep=True)

    def _store(self, question: Question, answer: Answer, job: Job, model: str, key: str | None) -> Json:
        """The answer under its question, with everything that is needed to say where it came from."""
        facts: dict[str, Any] = {
            "model": model, "digest": self.engine.facts["digest"], "sampling": asdict(job.sampling),
            "adapter": self.engine.facts["adapters"].get(job.user), "finish": answer.finish, "tokens": answer.tokens,
            "prompt_tokens": answer.prompt_tokens, "ttft_s": round(answer.ttft_s, 4),
            "seconds": round(answer.seconds, 4), "dropped": question.dropped,
        }  # fmt: skip
        if answer.taste:
            facts["taste"] = dict(answer.taste)
        return conversations.add_message(
            self.store, question.conversation["id"], parent=question.message, role="assistant",
            content=answer.text.rstrip(), facts=facts, key=key,
        )  # fmt: skip

    def _store_cut(self, question: Question, answer: Answer, job: Job, model: str, key: str | None) -> None:
        """`_store`, unless the conversation is gone by now."""
        try:
            self._store(question, answer, job, model, key)
        except Fault:
            return

    def _store_pair(self, question: Question, answers: list[tuple[Answer, Job, str]]) -> tuple[Json, Chosen]:
        left, right = (self._store(question, answer, job, model, None) for answer, job, model in answers)
        pair = preferences.compare(self.store, prompt=question.message, left=left["id"], right=right["id"])
        shown = {"type": "comparison", "comparison": pair, "left": left, "right": right, "dropped": question.dropped}
        return shown, preferences.as_chosen(self.store, pair)


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
