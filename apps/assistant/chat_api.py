"""The page's API. Everything is JSON; ids are 32 hex digits; times are seconds since 1970.

    GET    /api/state                            model, users with adapters, context, settings in force
    GET    /api/settings    PUT /api/settings    PUT changes what it names; null goes back to the default
    GET    /api/conversations?query&user&limit&offset      the latest first
    POST   /api/conversations                    {title, user, system}, all optional
    GET    /api/conversations/{id}               every message of every branch, with thumbs, and comparisons
    PATCH  /api/conversations/{id}               rename; another head (branch on show), user, system turn
    DELETE /api/conversations/{id}
    POST   /api/conversations/{id}/messages      {content, parent}: a question; again under one parent: a branch
    POST   /api/messages/{id}/answers            answer a question; again: regenerate. Sampling as in /v1
    POST   /api/messages/{id}/comparisons        two answers to a question, to be chosen from
    POST   /api/comparisons                      {left, right}: two answers that are there already
    PUT    /api/comparisons/{id}/choice          {choice: left | right | tie}; `learned`: what it taught (taste_api.py)
    PUT    /api/messages/{id}/feedback           {rating: 1 | -1, reasons, comment}; DELETE takes it back.
                                                 One up and one down under a question are a choice
    POST   /api/messages/{id}/edit               {content}: the answer as it should have been, preferred to the old one
    GET    /api/choices?user&form=pair|thumb     JSON lines for `edgealign personalize --choices`
    GET    /api/export?conversation              POST /api/import: the same document; what is there already is skipped
    DELETE /api/users/{user}                     everything of one user, what was learned of them too

Answers come as events, `data: {...}` lines: {"type": "start", "message": ID}, {"type": "token", "text"}, then
{"type": "answer", "message": {...}, "dropped": turns that no longer fitted}. Comparisons: "token" events have a "side",
{"type": "again", "side"} takes a side's text back, and the end is {"type": "comparison", "comparison", "left",
"right"}, or, where the model has no two different answers, that of one. After the start an error is an event
{"error": {...}}. Closing the connection stops the model; what it had said of an answer is stored under ID, of two
answers the first if it was finished.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from assistant import conversations, preferences, transfer
from assistant.answers import Answerer
from assistant.conversations import Json
from assistant.engine import Engine
from assistant.forms import (
    AnswerForm,
    Archive,
    Archived,
    Choice,
    CompareForm,
    ComparisonRecord,
    ConversationChange,
    ConversationListed,
    Counts,
    Edit,
    ExistingPair,
    Feedback,
    Forgotten,
    Id,
    MessageRecord,
    NewConversation,
    NewMessage,
    Settings,
    State,
    User,
)
from assistant.metrics import Metrics
from assistant.store import Store
from assistant.streams import EventStream, first_of
from assistant.taste_forms import Chosen, EditedRecord, Rated
from assistant.tastes import Tastes
from assistant.training import Trainer
from edgealign import __version__

EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "events"}}
LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {}}, "description": "JSON lines"}}


def routes(
    engine: Engine, store: Store, answerer: Answerer, metrics: Metrics, tastes: Tastes, trainer: Trainer
) -> APIRouter:
    """The endpoints over one engine and one store."""
    router = APIRouter(prefix="/api", tags=["page"])

    async def learned(message: str) -> Json | None:
        """What a choice under this message taught of whose conversation it is."""
        talk, _ = await asyncio.to_thread(conversations.path_to, store, message)
        return await tastes.learn_soon(talk["user"])

    async def learned_of_thumbs(rated: Json) -> Json | None:
        """What a thumb taught: it is a choice where another answer to the question has the other thumb, or had."""
        others = await asyncio.to_thread(preferences.thumbs_beside, store, rated["id"])
        return await learned(rated["id"]) if others else None

    async def others_choices(users: Iterable[str]) -> None:
        """These users' choices are not what they were: the registry has them so at once, and they are learned again."""
        for user in users:
            await asyncio.to_thread(tastes.mirror, user)
            tastes.learn_later(user)

    @router.get("/state", response_model=State)
    def get_state() -> Json:
        return {
            "version": __version__, "model": engine.name, "models": list(engine.models()),
            "users": sorted({*engine.users, *engine.personal}), "runtime": engine.facts["runtime"],
            "digest": engine.facts["digest"], "context": engine.context, "queue": engine.queue,
            "settings": answerer.settings(),
        }  # fmt: skip

    @router.get("/settings", response_model=Settings)
    def get_settings() -> Json:
        return answerer.settings()

    @router.put("/settings", response_model=Settings)
    def put_settings(form: Settings) -> Json:
        preferences.change_settings(store, form.model_dump(include=form.model_fields_set))
        return answerer.settings()

    @router.get("/conversations", response_model=list[ConversationListed])
    def list_conversations(
        query: Annotated[str, Query(max_length=1000)] = "", user: User | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100, offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> list[Json]:  # fmt: skip
        return conversations.search(store, query=query, user=user, limit=limit, offset=offset)

    @router.post("/conversations", response_model=Archived, status_code=201)
    def create_conversation(form: NewConversation) -> Json:
        known = answerer.settings()
        system = known["system"] if form.system is None else form.system
        return conversations.create(store, title=form.title, user=form.user or known["user"], system=system)

    @router.get("/conversations/{conversation}", response_model=Archived)
    def get_conversation(conversation: Id) -> Json:
        return conversations.read(store, conversation)

    @router.patch("/conversations/{conversation}", response_model=Archived)
    async def change_conversation(conversation: Id, form: ConversationChange) -> Json:
        found = Archived(**await asyncio.to_thread(conversations.read, store, conversation))
        changed = await asyncio.to_thread(conversations.update, store, conversation, form.model_dump(exclude_none=True))
        if (found.user, found.system) != (changed["user"], changed["system"]) and _holds_choices(found):
            await others_choices({found.user, changed["user"]})
        return changed

    @router.delete("/conversations/{conversation}", status_code=204)
    async def delete_conversation(conversation: Id) -> None:
        found = Archived(**await asyncio.to_thread(conversations.read, store, conversation))
        await asyncio.to_thread(conversations.delete, store, conversation)
        await others_choices({found.user} if _holds_choices(found) else ())

    @router.post("/conversations/{conversation}/messages", response_model=MessageRecord, status_code=201)
    def add_message(conversation: Id, form: NewMessage) -> Json:
        return conversations.add_message(
            store, conversation, parent=form.parent, role="user", content=form.content, facts={}
        )

    @router.post("/messages/{message}/answers", response_model=MessageRecord, responses=EVENTS)
    async def answer(message: Id, form: AnswerForm, request: Request) -> Any:
        if not form.stream:
            return await answerer.answer_whole(message, form, request)
        return EventStream(await first_of(answerer.answer(message, form), request))

    @router.post("/messages/{message}/comparisons", response_class=Response, responses=EVENTS)
    async def compare(message: Id, form: CompareForm, request: Request) -> Response:
        return EventStream(await first_of(answerer.compare(message, form), request))

    @router.post("/comparisons", response_model=ComparisonRecord, status_code=201)
    def compare_existing(form: ExistingPair) -> Json:
        prompt = conversations.message(store, form.left)["parent"]
        return preferences.compare(store, prompt=prompt, left=form.left, right=form.right)

    @router.put("/comparisons/{comparison}/choice", response_model=Chosen)
    async def choose(comparison: Id, form: Choice) -> Json:
        chosen = await asyncio.to_thread(preferences.choose, store, comparison, form.choice)
        metrics.feedback.labels("choice").inc()
        return {**chosen, "learned": await learned(chosen["prompt"])}

    @router.put("/messages/{message}/feedback", response_model=Rated)
    async def put_feedback(message: Id, form: Feedback) -> Json:
        rated = await asyncio.to_thread(
            preferences.set_feedback, store, message, rating=form.rating, reasons=form.reasons, comment=form.comment
        )
        metrics.feedback.labels("thumb").inc()
        return {**rated, "learned": await learned_of_thumbs(rated)}

    @router.delete("/messages/{message}/feedback", response_model=Rated)
    async def delete_feedback(message: Id) -> Json:
        cleared = await asyncio.to_thread(preferences.clear_feedback, store, message)
        return {**cleared, "learned": await learned_of_thumbs(cleared)}

    @router.post("/messages/{message}/edit", response_model=EditedRecord, status_code=201)
    async def edit(message: Id, form: Edit) -> Json:
        new, comparison = await asyncio.to_thread(preferences.edit, store, message, form.content)
        metrics.feedback.labels("edit").inc()
        return {"message": new, "comparison": comparison, "learned": await learned(message)}

    @router.get("/choices", response_class=Response, responses=LINES)
    def get_choices(user: User | None = None, form: Literal["pair", "thumb"] = "pair") -> Response:
        rows = preferences.pairs(store, user) if form == "pair" else preferences.thumbs(store, user)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return Response(text, media_type="application/jsonl")

    @router.get("/export", response_model=Archive)
    def export(conversation: Id | None = None) -> Json:
        return transfer.export(store, conversation)

    @router.post("/import", response_model=Counts)
    async def import_all(form: Archive) -> dict[str, int]:
        counts = await asyncio.to_thread(transfer.import_all, store, form)
        await others_choices({each.user for each in form.conversations if _holds_choices(each)})
        return counts

    @router.delete("/users/{user:path}", response_model=Forgotten)
    async def forget(user: User) -> dict[str, int]:
        await trainer.forget(user)
        async with tastes.lock:  # a fit that is going on would bring back what it knows
            conversations = await asyncio.to_thread(transfer.forget, store, user)
            return {"conversations": conversations, "versions": await asyncio.to_thread(tastes.forget, user)}

    return router


def _holds_choices(conversation: Archived) -> bool:
    return bool(conversation.comparisons) or any(message.feedback for message in conversation.messages)
