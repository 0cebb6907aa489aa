"""The API of "your taste". `user` is whose; without one, who is speaking by the settings.

    GET    /api/taste?user             words, versions, strength, what is going on
    PUT    /api/taste/strength?user    {strength}: how far answers follow it; 0: not at all
    POST   /api/taste/active?user      {version}: undo and redo; 0: the model as it is for everybody
    POST   /api/taste/training?user    train a LoRA in the background; used if it beats the version in use
    DELETE /api/taste/training?user    stop that

Choices themselves are made under /api/comparisons and /api/messages; to forget a user is DELETE /api/users/{user}.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from assistant.answers import Answerer
from assistant.conversations import Json
from assistant.faults import Fault
from assistant.forms import User
from assistant.taste_forms import ActiveForm, StrengthForm, TasteState
from assistant.tastes import Tastes
from assistant.training import Trainer
from edgealign.errors import EdgealignError
from edgealign.personalize.recipes import MAX_TASTE, MIN_CHOICES, TASTE

Whose = Annotated[User | None, Query(description="none: who is speaking by the settings")]


def routes(answerer: Answerer, tastes: Tastes, trainer: Trainer) -> APIRouter:
    """The endpoints over one server's tastes."""
    router = APIRouter(prefix="/api/taste", tags=["taste"])

    def named(user: str | None) -> str:
        return user or str(answerer.settings()["user"])

    @router.get("", response_model=TasteState)
    def get_taste(user: Whose = None) -> Json:
        return state_of(tastes, trainer, named(user))

    @router.put("/strength", response_model=TasteState)
    def put_strength(form: StrengthForm, user: Whose = None) -> Json:
        tastes.set_strength(named(user), form.strength)
        return state_of(tastes, trainer, named(user))

    @router.post("/active", response_model=TasteState)
    def activate(form: ActiveForm, user: Whose = None) -> Json:
        known = tastes.versions.user(named(user))
        if form.version not in (0, *(each.number for each in known.versions if known)) if known else form.version:
            raise Fault(404, "no such version of this user", code="not_found", param="version")
        if known:
            tastes.activate(named(user), form.version)
        return state_of(tastes, trainer, named(user))

    @router.post("/training", response_model=TasteState, status_code=202)
    async def train(user: Whose = None) -> Json:
        await trainer.start(named(user))
        return await asyncio.to_thread(state_of, tastes, trainer, named(user))

    @router.delete("/training", response_model=TasteState)
    async def stop_training(user: Whose = None) -> Json:
        await trainer.cancel(named(user))
        return await asyncio.to_thread(state_of, tastes, trainer, named(user))

    return router


def state_of(tastes: Tastes, trainer: Trainer, user: str) -> Json:
    """`TasteState` of one user; a damaged registry is told, and nothing else fails."""
    closed, known, choices, fault = tastes.closed_to(user), None, 0, tastes.faults.get(user, "")
    why_not, trainable = tastes.why_not_for(user), trainer.why_not(user)
    if why_not and not trainable:
        why_not += f"; a LoRA can be trained, from {MIN_CHOICES} choices on"
    try:
        known = tastes.versions.user(user)
        choices = len(tastes.choices(user))
        used = tastes.engine.personal.get(user)
        if known and not closed and (used.facts.get("version", known.active) if used else 0) != known.active:
            tastes.refresh(user)  # `edgealign users` was there in the meantime
            fault = tastes.faults.get(user, "")
    except EdgealignError as error:
        fault = error.line()
    versions = [
        {
            "version": each.number, "made_s": each.made_s, "method": each.method, "choices": each.choices,
            "words": each.words, "score": each.score, "population": each.population,
            "active": each.number == (known.active if known else 0),
        }
        for each in (known.versions if known else ())
    ]  # fmt: skip
    return {
        "user": user, "ready": not why_not, "why_not": why_not, "fault": fault,
        "simulated": tastes.basis is not None and tastes.basis.simulated, "choices": choices,
        "words": next((each["words"] for each in versions if each["active"]), ""),
        "active": known.active if known else 0, "strength": tastes.versions.strength(user), "usual_strength": TASTE,
        "max_strength": MAX_TASTE, "versions": versions, "learning": user in tastes.learning,
        "decision": tastes.versions.decision(user), "trainable": trainable, "training": trainer.state(user),
    }  # fmt: skip

