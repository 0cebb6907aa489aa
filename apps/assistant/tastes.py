"""A user's choices become a few numbers, in place: fitted after each choice, checked, kept as versions, undone at will.

    tastes = open_tastes(engine, store, home / "users", basis=None)
    learned = await tastes.learn("me")        # after a choice
    tastes.activate("me", 2)                  # an earlier version; 0: the model as it is for everybody
    left, right = tastes.probe("me")          # two ways to answer that differ where the user is known least

The numbers are weights on a basis (`edgealign basis`); they tilt the next token of that user's answers and of nobody
else's. A version is published into the registry of `edgealign users` only if the choices, each predicted from the
others, are predicted at least as well as by the population. The registry has all choices of a user: those of the
terminal, and a mirror of those that the store keeps with their conversations.

Shape legend: k choices, B rank, V vocabulary.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from assistant import preferences
from assistant.conversations import Json
from assistant.engine import Engine
from assistant.pieces import Personal
from assistant.preferences import Chosen
from assistant.readings import READ_TOKENS, Readings, without_empty_answers
from assistant.store import Store
from assistant.versions import Versions
from edgealign.errors import EdgealignError, InputError
from edgealign.personalize import embedding
from edgealign.personalize.adapter import open_adapter
from edgealign.personalize.basis import OpenBasis, basis_of_model
from edgealign.personalize.choices import drop_repetitions
from edgealign.personalize.embedding import Preference
from edgealign.personalize.in_place import LEAST, foreseen, learn, ranked_right
from edgealign.personalize.lore import fit_users
from edgealign.personalize.ranking import Triple, rank_choices
from edgealign.personalize.recipes import MAX_CHOICES
from edgealign.personalize.tilt import Tilt, apart
from edgealign.personalize.users import UserVersion
from edgealign.runtimes.convert import as_runtime_reads

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Session

    Floats = npt.NDArray[np.float64]

SWITCHED = ("peft", "direction")  # formats of adapters that a session switches on
SOON_S = 2.0  # how long the answer to a choice waits for what it taught


class Tastes:
    """Over one engine and one store. `basis` None: choices teach no numbers, `why_not` says why; LoRAs need none."""

    def __init__(
        self, engine: Engine, store: Store, folder: Path, *, basis: OpenBasis | None, why_not: str = ""
    ) -> None:
        self.engine, self.store, self.basis, self.why_not = engine, store, basis, why_not
        self.versions = Versions(store, folder)
        self.given = frozenset(engine.users)  # these came with an adapter, and keep it
        self.faults: dict[str, str] = {}
        self.learning: set[str] = set()
        self.lock = asyncio.Lock()  # one fit at a time: the last one sees every choice
        self.readings = Readings(engine, store, basis) if basis is not None else None
        self._held: set[asyncio.Future[Json | None]] = set()
        self._known: dict[str, Preference] = {}
        self._mirroring = threading.Lock()
        self._refreshing = threading.Lock()  # what is read last is what is used
        self._registry_fault = ""
        self._start()

    def why_not_for(self, user: str) -> str:
        """Why choices teach no numbers of this user; empty where they do."""
        return self.closed_to(user) or (self.why_not if self.basis is None else "")

    def closed_to(self, user: str) -> str:
        """Why this user can have no version made here; empty where they can."""
        if user in self.given:
            return "this user's adapter came with the model, and is used as it is"
        if not user.strip() or not user.isprintable():
            return "a user whose name cannot be printed is not remembered"
        return self._registry_fault

    # What is learned.

    async def learn_soon(self, user: str) -> Json | None:
        """`learn`, if it is done in a moment; it goes on either way."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.learn_later(user)), SOON_S)
        except TimeoutError:
            return None

    def learn_later(self, user: str) -> asyncio.Future[Json | None]:
        """`learn`, beside everything else."""
        learning = asyncio.ensure_future(self.learn(user))
        self._held.add(learning)
        learning.add_done_callback(self._held.discard)
        return learning

    def close(self) -> None:
        """Leave what is going on: choices are stored, and are learned from at the next one."""
        for task in list(self._held):
            task.cancel()
        if self.readings is not None:
            self.readings.close()

    async def learn(self, user: str) -> Json | None:
        """Fit on all that this user chose, and use it if it does no harm. None: nothing is learned of them.

        What goes wrong is said in `reason`: a choice is stored already, and must not seem lost.
        """
        if self.closed_to(user):
            return None
        async with self.lock:
            self.learning.add(user)
            try:
                await asyncio.to_thread(self.mirror, user)
                if self.readings is None:
                    return None
                chosen = await asyncio.to_thread(self.choices, user)
                rows = await self.readings.of_choices(chosen)
                in_use = await asyncio.to_thread(self.versions.in_use, user)
                if not len(rows) or in_use is None or in_use.method == "lore" or user in self.faults:
                    return await asyncio.to_thread(self._fit, user, chosen, rows)
                return await self._fit_beside(user, in_use, chosen, rows)
            except EdgealignError as error:
                return _learned(user, 0, reason=error.line())
            finally:
                self.learning.discard(user)

    async def ranked(self, adapter: Path | None, chosen: Sequence[Chosen]) -> float:
        """Share of these choices that the model ranks as they were made, by mean log-probability.

        Args:
            adapter: as the runtime reads it; None: the base model.
        """
        engine, margins = self.engine, list[float]()
        most = min(READ_TOKENS, engine.context // 2)
        for each in chosen:
            prompt = await asyncio.to_thread(engine.encode, without_empty_answers(each.pair.prompt))
            chosen_ids = await asyncio.to_thread(engine.encode_answer, each.pair.chosen)
            rejected_ids = await asyncio.to_thread(engine.encode_answer, each.pair.rejected)
            triple = prompt[-most:], chosen_ids[:most], rejected_ids[:most]
            margins += await engine.lend(partial(_margins, triple), adapter)
        return ranked_right(np.array(margins))

    def shown(self, chosen: Chosen) -> None:
        """Two answers are being shown: read them meanwhile."""
        if self.readings is not None and not self.why_not_for(str(chosen.pair.user_id)):
            self.readings.ahead(chosen)

    def choices(self, user: str) -> list[Chosen]:
        """The newest choices of one user, on the page and in the terminal, the last word on each question."""
        every = preferences.choices(self.store, user)
        if not self.closed_to(user):
            every = sorted([*every, *self.versions.choices(user)], key=lambda each: each.made_s)
        known = {id(each.pair): each for each in every}
        kept, _, _ = drop_repetitions([each.pair for each in every])
        return [known[id(pair)] for pair in kept[-MAX_CHOICES:]]

    def mirror(self, user: str) -> None:
        """Hold what was chosen on the page in the registry too, and no more of it: the terminal learns from there."""
        if not self.closed_to(user):
            with self._mirroring:  # or what was forgotten meanwhile would come back
                self.versions.mirror(user, preferences.choices(self.store, user))

    # Versions.

    def activate(self, name: str, number: int) -> None:
        """Use another version; 0 is the model as it is for everybody.

        Raises:
            UsageError: there is no such version, or nobody of that name.
        """
        self.versions.activate(name, number)
        self.versions.decide(name, "")
        self.refresh(name)

    def add_version(self, name: str, adapter: Path, use: bool = True) -> UserVersion:
        """Take a published adapter in, and use it or only keep it."""
        version = self.versions.add(name, adapter, use=use)
        self.refresh(name)
        return version

    def adapter_of(self, adapter: Path, converted: Path) -> Path:
        """A LoRA as the engine's runtime reads it.

        Raises:
            EdgealignError: damaged, of another model, or nothing that this runtime takes.
        """
        made, here = open_adapter(adapter), self.engine.facts["base_digest"]
        if made.meta["base_digest"] != here:
            reason = f"was fitted on the model {made.meta['base_digest'][:12]}, this one is {str(here)[:12]}"
            raise InputError(adapter, reason, "use another version, or train one")
        if made.manifest.format not in SWITCHED:
            reason = f"is {made.meta.get('method')}, with which only the terminal speaks"
            raise InputError(adapter, reason, "edgealign chat --user NAME, or use another version")
        return as_runtime_reads(adapter, Path(self.engine.facts["folder"]), kept=converted)

    def set_strength(self, user: str, strength: float) -> None:
        """How far this user's taste is followed; 0: not at all."""
        self.versions.set_strength(user, strength)
        self.refresh(user)

    def forget(self, name: str) -> int:
        """Remove versions, numbers and strength; how many versions there were. Conversations are not touched here."""
        for kept in (self.engine.personal, self.faults, self._known):
            kept.pop(name, None)
        with self._mirroring:
            return self.versions.forget(name)

    def refresh(self, name: str) -> None:
        """Make the engine answer with this user's version in use. A version that cannot be used is said, and left."""
        with self._refreshing:
            for kept in (self.faults, self._known):
                kept.pop(name, None)
            personal = None
            try:
                if version := self.versions.in_use(name):
                    strength = self.versions.strength(name)
                    personal = self._open(name, version, strength) if strength else Personal()
            except EdgealignError as error:
                self.faults[name] = error.line()
            if personal is None:
                self.engine.personal.pop(name, None)
            else:
                self.engine.personal[name] = personal

    def probe(self, name: str) -> tuple[Personal, Personal] | None:
        """Two ways to answer a user, on both sides of what is known (`tilt.apart`); None: they would be one."""
        strength = self.versions.strength(name)
        if self.basis is None or self.why_not_for(name) or strength == 0:
            return None
        own = self.engine.personal.get(name)
        if own is not None and own.tilt is None:
            return None  # a LoRA answers twice by itself
        rank = self.basis.folded.rank
        known = self._known.get(name) or Preference(np.zeros(rank), np.eye(rank), self.basis.digest)
        facts = {"version": own.facts["version"] if own else 0, "strength": strength, "asking": True}
        one, other = apart(self.basis, known.weights, known.covariance, strength=strength * known.scale)
        return Personal(tilt=one, facts=facts), Personal(tilt=other, facts=facts)

    # Inside.

    def _start(self) -> None:
        """Every user's version in use; a damaged registry is no reason not to chat."""
        names = []
        try:
            self.versions.sweep()
            names = [name for name in self.versions.names() if not self.closed_to(name)]
            for name in names:
                self.mirror(name)  # a server that was killed may have left it behind
        except EdgealignError as error:
            self._registry_fault = error.line()
        for name in names:
            self.refresh(name)

    def _open(self, name: str, version: UserVersion, strength: float) -> Personal:
        """A version as the engine takes it.

        Raises:
            EdgealignError: damaged, or of another basis or model.
        """
        facts = {
            "version": version.number, "method": version.method, "strength": strength, "digest": version.digest
        }  # fmt: skip
        if version.method == "lore":
            if self.basis is None:
                reason = "is numbers on a basis, and there is none here"
                raise InputError(f"version {version.number}", reason, "start with its --basis, or use another version")
            known = self._known[name] = embedding.read_preference(version.folder, self.basis)
            return Personal(tilt=Tilt.of(self.basis, known.weights, strength=strength * known.scale), facts=facts)
        adapter = self.adapter_of(version.folder, self.versions.converted(version))
        return Personal(adapter=adapter, facts=facts)

    def _fit(self, user: str, chosen: Sequence[Chosen], rows: Floats) -> Json:
        """Fit (k, B + 1) choices, check, publish, use. In a thread."""
        assert self.basis is not None
        if not len(rows):
            if (in_use := self.versions.in_use(user)) and in_use.method == "lore":
                self.activate(user, 0)  # what it was learned from is gone
            return _learned(user, 0, reason="nothing is preferred")
        with self.versions.registry() as users:
            learned = learn(users, user, self.basis, [each.pair for each in chosen], rows)
        if learned.version is not None:
            self.refresh(user)
        number = learned.version.number if learned.version else None
        return _learned(
            user, learned.choices, words=learned.words, version=number, reason=learned.reason, seconds=learned.seconds
        )

    async def _fit_beside(self, user: str, lora: UserVersion, chosen: Sequence[Chosen], rows: Floats) -> Json:
        """Fit (k, B + 1) choices beside the LoRA in use; they replace it if they foresee more of the choices since."""
        assert self.basis is not None
        words = self.basis.words(fit_users(torch.from_numpy(rows)[None]).weights[0])
        newer = [place for place, each in enumerate(chosen) if each.made_s > lora.made_s]
        outcome = f"version {lora.number}, which was trained, stays in use"
        if len(newer) < LEAST:
            reason = f"{outcome}; the numbers are compared with it after {LEAST} more choices, there are {len(newer)}"
            return _learned(user, len(rows), words=words, reason=reason)
        adapter = await asyncio.to_thread(self.adapter_of, lora.folder, self.versions.converted(lora))
        bar = await self.ranked(adapter, [chosen[place] for place in newer])
        score, learned = foreseen(rows, newer), _learned(user, len(rows), words=words)
        if score > bar:
            learned = await asyncio.to_thread(self._fit, user, chosen, rows)
            outcome = f"version {learned['version']} took the place of version {lora.number}, which was trained"
            if learned["version"] is None:
                return learned
        reason = f"{outcome}: of {len(newer)} choices since, it ranks {bar:.0%} as you did, the numbers {score:.0%}"
        await asyncio.to_thread(self.versions.decide, user, reason)
        return {**learned, "reason": reason}


def open_tastes(engine: Engine, store: Store, folder: Path, *, basis: str | None = None) -> Tastes:
    """With this basis, or with the starter's where the model is the starter.

    Raises:
        UsageError: no basis, or one of another model.
    """
    try:
        shared = basis_of_model(engine.facts.get("base_digest"), basis)
    except EdgealignError as error:
        if basis is not None:
            raise
        return Tastes(engine, store, folder, basis=None, why_not=error.line())
    return Tastes(engine, store, folder, basis=shared)


def _margins(triple: Triple, session: Session) -> tuple[float, ...]:
    return rank_choices(session, [triple]).margins


def _learned(
    user: str, choices: int, *, words: str = "", version: int | None = None, reason: str = "", seconds: float = 0.0
) -> Json:
    """What a choice taught, and how long the fit took; `version` None: nothing was published, for this reason."""
    seconds = round(seconds, 4)
    return {
        "user": user, "choices": choices, "words": words, "version": version, "reason": reason, "seconds": seconds
    }  # fmt: skip
