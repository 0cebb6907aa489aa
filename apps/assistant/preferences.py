"""What the user prefers: thumbs with reasons, choices between two answers, and edited answers (the edit is preferred).

A thumb up and a thumb down on two answers to one question are a choice too.

Each has a natural key (a message's thumb, a comparison's choice), so that sending one again stores it once. `pairs` and
`thumbs` are the rows that `edgealign personalize` and `edgealign data check` read.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from assistant import conversations
from assistant.conversations import Json
from assistant.faults import Fault
from assistant.store import Store
from edgealign.data.forms import Message, Pair, Thumb, to_json

# Comparisons with a choice; and of each question the newest answer with a thumb up before the newest with a thumb down.
CHOICES = """
WITH verdicts AS (
    SELECT m.parent AS prompt, m.id, f.rating, f.created_s,
        row_number() OVER (PARTITION BY m.parent, f.rating ORDER BY f.created_s DESC, f.rowid DESC) AS age
    FROM feedback f JOIN messages m ON m.id = f.message JOIN conversations t ON t.id = m.conversation
    WHERE :user IS NULL OR t.user = :user
), preferred AS (
    SELECT prompt, iif(choice = 'left', left_answer, right_answer) AS best_id,
        iif(choice = 'left', right_answer, left_answer) AS other_id, chosen_s AS made_s
    FROM comparisons WHERE choice IN ('left', 'right')
    UNION ALL
    SELECT up.prompt, up.id, down.id, max(up.created_s, down.created_s)
    FROM verdicts up JOIN verdicts down ON down.prompt = up.prompt AND up.rating = 1 AND down.rating = -1
    WHERE up.age = 1 AND down.age = 1
)
SELECT p.*, best.content AS best, other.content AS other FROM preferred p
    JOIN messages best ON best.id = p.best_id JOIN messages other ON other.id = p.other_id
    JOIN conversations t ON t.id = best.conversation
WHERE best.content <> other.content AND (:user IS NULL OR t.user = :user)
"""


@dataclass(frozen=True)
class Chosen:
    """A choice, the ids of the two answers, and when it was made."""

    pair: Pair
    chosen: str
    rejected: str
    made_s: float = 0.0


def set_feedback(store: Store, message: str, *, rating: int, reasons: Sequence[str], comment: str) -> Json:
    """A thumb on an answer; a later one replaces it.

    Raises:
        Fault: no such answer.
    """
    with store.write() as db:
        _answer_of(db, message)
        db.execute(
            "INSERT OR REPLACE INTO feedback VALUES (?, ?, ?, ?, ?)",
            (message, rating, json.dumps(list(reasons)), comment, time.time()),
        )
    return conversations.message(store, message)


def clear_feedback(store: Store, message: str) -> Json:
    """Take the thumb back."""
    with store.write() as db:
        _answer_of(db, message)
        db.execute("DELETE FROM feedback WHERE message = ?", (message,))
    store.scrub()
    return conversations.message(store, message)


def compare(store: Store, *, prompt: str, left: str, right: str) -> Json:
    """Two answers to one question, to be chosen from."""
    key = uuid.uuid4().hex
    with store.write() as db:
        if {_answer_of(db, left)["parent"], _answer_of(db, right)["parent"]} != {prompt} or left == right:
            raise Fault(400, "the two are not different answers to this message", code="invalid_value")
        db.execute(
            "INSERT INTO comparisons VALUES (?, ?, ?, ?, 'compare', NULL, ?, NULL)",
            (key, prompt, left, right, time.time()),
        )
    return comparison(store, key)


def comparison(store: Store, key: str) -> Json:
    """One comparison.

    Raises:
        Fault: there is none.
    """
    with store.read() as db:
        row = db.execute("SELECT * FROM comparisons WHERE id = ?", (key,)).fetchone()
    if row is None:
        raise Fault(404, "no such comparison", code="not_found")
    return conversations.as_comparison(row)


def choose(store: Store, key: str, choice: str) -> Json:
    """Left, right or tie; a later choice replaces it. The chosen answer's branch is the one on show.

    Raises:
        Fault: no such comparison.
    """
    found = comparison(store, key)
    with store.write() as db:
        db.execute("UPDATE comparisons SET choice = ?, chosen_s = ? WHERE id = ?", (choice, time.time(), key))
        head = found["right"] if choice == "right" else found["left"]
        db.execute(
            "UPDATE conversations SET head = ?1 WHERE id = (SELECT conversation FROM messages WHERE id = ?1)", (head,)
        )
    return comparison(store, key)


def edit(store: Store, message: str, content: str) -> tuple[Json, Json]:
    """An answer as the user would have it: a new answer beside the old one, preferred to it. Returns both facts.

    Raises:
        Fault: no such answer, or the same text.
    """
    with store.write() as db:
        old = _answer_of(db, message)
        if old["content"].strip() == content.strip():
            raise Fault(400, "content: is what the answer says already", code="invalid_value", param="content")
        key, now_s = uuid.uuid4().hex, time.time()
        new = conversations.insert_message(
            db, old["conversation"], parent=old["parent"], role="assistant", content=content,
            facts={**json.loads(old["facts"]), "edited_from": message},
        )  # fmt: skip
        db.execute(
            "INSERT INTO comparisons VALUES (?, ?, ?, ?, 'edit', 'left', ?, ?)",
            (key, old["parent"], new, message, now_s, now_s),
        )
    return conversations.message(store, new), comparison(store, key)


def pairs(store: Store, user: str | None) -> list[Json]:
    """Every choice that prefers one answer, as rows of `prompt`, `chosen`, `rejected`, `user_id`; oldest first."""
    return [to_json(chosen.pair) for chosen in choices(store, user)]


def choices(store: Store, user: str | None) -> list[Chosen]:
    """Every choice that prefers one answer, oldest first; an answer that is empty was no alternative."""
    with store.read() as db:
        rows = db.execute(f"{CHOICES} ORDER BY made_s", {"user": user}).fetchall()
        found = []
        for row in rows:
            if row["best"].strip() and row["other"].strip():
                talk, turns = conversations.path_in(db, row["prompt"])
                pair = Pair(_prompt(talk, turns), row["best"], row["other"], user_id=talk["user"])
                found.append(Chosen(pair, row["best_id"], row["other_id"], row["made_s"]))
        return found


def as_chosen(store: Store, comparison: Json) -> Chosen:
    """A comparison that waits, as if the left answer had been chosen."""
    talk, turns = conversations.path_to(store, comparison["prompt"])
    left, right = (conversations.message(store, comparison[side])["content"] for side in ("left", "right"))
    pair = Pair(_prompt(talk, turns), left, right, user_id=talk["user"])
    return Chosen(pair, comparison["left"], comparison["right"])


def thumbs(store: Store, user: str | None) -> list[Json]:
    """Every thumb, as rows of `prompt`, `completion`, `label`, `user_id`; oldest first."""
    found = []
    with store.read() as db:
        rows = db.execute(
            "SELECT f.rating, m.id FROM feedback f JOIN messages m ON m.id = f.message ORDER BY f.created_s"
        ).fetchall()
        for row in rows:
            talk, turns = conversations.path_in(db, row["id"])
            if user in (None, talk["user"]):
                answer = turns[-1]["content"]
                thumb = Thumb(_prompt(talk, turns[:-1]), answer, row["rating"] > 0, user_id=talk["user"])
                found.append(to_json(thumb))
    return found


def thumbs_beside(store: Store, message: str) -> bool:
    """Whether other answers to the same question have a thumb."""
    with store.read() as db:
        row = db.execute(
            "SELECT 1 FROM messages own JOIN messages other ON other.parent = own.parent AND other.id <> own.id"
            " JOIN feedback f ON f.message = other.id WHERE own.id = ?",
            (message,),
        ).fetchone()
    return row is not None


def settings(store: Store) -> Json:
    """What was stored, by name."""
    with store.read() as db:
        return {row["name"]: json.loads(row["value"]) for row in db.execute("SELECT * FROM settings")}


def change_settings(store: Store, values: Json) -> None:
    """Store these; None takes one back to its default."""
    with store.write() as db:
        for name, value in values.items():
            if value is None:
                db.execute("DELETE FROM settings WHERE name = ?", (name,))
            else:
                db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))


def _prompt(talk: Json, turns: Sequence[Json]) -> tuple[Message, ...]:
    head = (Message("system", talk["system"]),) if talk["system"] else ()
    return (*head, *(Message(turn["role"], turn["content"]) for turn in turns))


def _answer_of(db: Any, message: str) -> Any:
    row = db.execute("SELECT * FROM messages WHERE id = ? AND role = 'assistant'", (message,)).fetchone()
    if row is None:
        raise Fault(404, "no such answer", code="not_found")
    return row
