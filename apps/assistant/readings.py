"""What an answer is worth in each direction of a basis: read once by the base model, and kept beside the answer.

    readings = Readings(engine, store, basis)
    readings.ahead(chosen)                    # two answers that are being shown: a choice has nothing to wait for
    rows = await readings.of_choices(all)     # (k, B + 1), read where they are not kept

The numbers go with their message: whoever deletes a conversation deletes them. No text is in them.

Shape legend: k choices, B rank.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from assistant.engine import Engine
from assistant.faults import Fault
from assistant.preferences import Chosen
from assistant.store import Store
from edgealign.data.forms import Message
from edgealign.errors import EdgealignError
from edgealign.personalize.basis import OpenBasis
from edgealign.personalize.recipes import EmbeddingRecipe

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

READ_TOKENS = EmbeddingRecipe().max_tokens  # of a prompt its end, of an answer its beginning


class Readings:
    """Over one engine, one store and one basis."""

    def __init__(self, engine: Engine, store: Store, basis: OpenBasis) -> None:
        self.engine, self.store, self.basis = engine, store, basis
        self._ahead: set[asyncio.Task[None]] = set()
        self._read: dict[str, Floats] = {}  # of answers that are no message here: the terminal's

    def ahead(self, chosen: Chosen) -> None:
        """Begin to read two answers, in either order."""

        async def read() -> None:
            try:
                await self.of_choices([chosen])
            except (EdgealignError, Fault):
                return  # it is tried again, and said, after the choice

        task = asyncio.get_running_loop().create_task(read())
        self._ahead.add(task)
        task.add_done_callback(self._ahead.discard)

    async def of_choices(self, chosen: Sequence[Chosen]) -> Floats:
        """(k, B + 1): the chosen answers' numbers minus the rejected ones'."""
        rows = []
        for each in chosen:
            best = await self._of(each.chosen, each.pair.prompt, each.pair.chosen)
            rows.append(best - await self._of(each.rejected, each.pair.prompt, each.pair.rejected))
        return np.stack(rows) if rows else np.zeros((0, self.basis.folded.rank + 1))

    def close(self) -> None:
        for task in list(self._ahead):
            task.cancel()

    async def _of(self, message: str, prompt: Sequence[Message], text: str) -> Floats:
        """(B + 1,) of one answer."""
        engine, folded = self.engine, self.basis.folded
        heard = without_empty_answers(prompt)
        facts = [self.basis.digest, engine.facts["digest"], [each.as_dict() for each in heard], text]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        found = await asyncio.to_thread(self._kept, message, key) if message else self._read.get(key)
        if found is None:
            most = min(READ_TOKENS, engine.context // 2)
            before = (await asyncio.to_thread(engine.encode, heard))[-most:]
            answer = (await asyncio.to_thread(engine.encode_answer, text))[:most]
            found = await engine.lend(lambda session: folded.of(session, before, answer))
            if message:
                await asyncio.to_thread(self._keep, message, key, found)
            else:
                self._read[key] = found
        return found

    def _kept(self, message: str, key: str) -> Floats | None:
        with self.store.read() as db:
            row = db.execute("SELECT numbers FROM features WHERE message = ? AND key = ?", (message, key)).fetchone()
        return None if row is None else np.frombuffer(row["numbers"], dtype=np.float64)

    def _keep(self, message: str, key: str, numbers: Floats) -> None:
        with self.store.write() as db:  # nothing, if the answer was deleted while it was read
            db.execute(
                "INSERT OR REPLACE INTO features SELECT id, ?, ? FROM messages WHERE id = ?",
                (key, numbers.astype(np.float64).tobytes(), message),
            )


def without_empty_answers(prompt: Sequence[Message]) -> list[Message]:
    """What the model was shown: a template may know no empty answer, so it goes with its question."""
    empty = {place for place, each in enumerate(prompt) if each.role == "assistant" and not each.content.strip()}
    return [each for place, each in enumerate(prompt) if place not in empty and place + 1 not in empty]
