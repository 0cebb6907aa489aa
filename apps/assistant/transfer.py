"""Conversations out of the store and back in, and forgetting a user.

    {"format": "edgealign.conversations", "version": 1, "conversations": [{"id": ..., "messages": [...], ...}]}

What is there already (by id) is left as it is, so importing a file twice changes nothing the second time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from assistant import conversations
from assistant.conversations import Json
from assistant.faults import Fault
from assistant.forms import DEFAULT_USER, Archive, Archived
from assistant.store import Store

COMPARISON = ("id", "prompt", "left", "right", "source", "choice", "created_s", "chosen_s")  # as the table has them
FORMAT, VERSION = "edgealign.conversations", 1


def export(store: Store, only: str | None) -> Json:
    """All conversations, or one, as one document."""
    with store.read() as db:
        found = [only] if only else [row[0] for row in db.execute("SELECT id FROM conversations ORDER BY created_s")]
        return {
            "format": FORMAT, "version": VERSION,
            "conversations": [conversations.read_from(db, key) for key in found],
        }  # fmt: skip


def import_all(store: Store, archive: Archive) -> dict[str, int]:
    """All of a document, or nothing of it.

    Raises:
        Fault: a tree that is none, or an id that belongs to another conversation.
    """
    imported = 0
    with store.write() as db:
        for number, entry in enumerate(archive.conversations):
            if db.execute("SELECT 1 FROM conversations WHERE id = ?", (entry.id,)).fetchone():
                continue
            _check(entry, f"conversations.{number}")
            used = [*(item.id for item in entry.messages), *(pair.id for pair in entry.comparisons)]
            if _known(db, "messages", used) or _known(db, "comparisons", used):
                raise _bad(f"conversations.{number}", "has an id of another conversation")
            db.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)",
                (entry.id, entry.title, entry.user, entry.system, entry.created_s, entry.updated_s, entry.head),
            )
            db.executemany(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (item.id, entry.id, item.parent, item.role, item.content, item.created_s, json.dumps(item.facts))
                    for item in entry.messages
                ],
            )
            db.executemany(
                "INSERT INTO feedback VALUES (?, ?, ?, ?, ?)",
                [
                    (item.id, thumb.rating, json.dumps(thumb.reasons), thumb.comment, thumb.created_s)
                    for item in entry.messages if (thumb := item.feedback) is not None
                ],
            )  # fmt: skip
            db.executemany(
                "INSERT INTO comparisons VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    tuple(getattr(pair, name) for name in COMPARISON) for pair in entry.comparisons
                ],
            )
            imported += 1
    return {"imported": imported, "skipped": len(archive.conversations) - imported}


def forget(store: Store, user: str) -> int:
    """Delete everything of one user; their text is gone from the disk afterwards. How many conversations.

    Who speaks by the settings takes their name and their instructions along.
    """
    with store.write() as db:
        count = db.execute("DELETE FROM conversations WHERE user = ?", (user,)).rowcount
        speaking = db.execute("SELECT value FROM settings WHERE name = 'user'").fetchone()
        if user == (json.loads(speaking["value"]) if speaking else DEFAULT_USER):
            db.execute("DELETE FROM settings WHERE name IN ('user', 'system')")
    store.scrub()
    return int(count)


def _check(entry: Archived, place: str) -> None:
    """Parents come before their children and sides take turns; thumbs and comparisons are of answers."""
    try:
        json.dumps([item.facts for item in entry.messages], allow_nan=False)
    except (ValueError, RecursionError):
        raise _bad(place, "has facts that are no JSON") from None
    roles: dict[str, tuple[str, str | None]] = {}
    for item in entry.messages:
        above = None if item.parent is None else roles.get(item.parent)
        if item.id in roles or (item.parent is not None and above is None):
            raise _bad(place, "a message comes twice, or before its parent")
        if item.role != ("assistant" if above is not None and above[0] == "user" else "user"):
            raise _bad(place, "the two sides do not take turns")
        if item.feedback is not None and item.role != "assistant":
            raise _bad(place, "a thumb is on a question")
        roles[item.id] = (item.role, item.parent)
    if entry.head is not None and entry.head not in roles:
        raise _bad(place, "the head is no message of it")
    for pair in entry.comparisons:
        wanted = ("assistant", pair.prompt)
        if pair.left == pair.right or roles.get(pair.left) != wanted or roles.get(pair.right) != wanted:
            raise _bad(place, "a comparison is not of two answers to one question")
    if len({pair.id for pair in entry.comparisons}) != len(entry.comparisons):
        raise _bad(place, "a comparison comes twice")


def _known(db: sqlite3.Connection, table: str, keys: Sequence[str]) -> bool:
    return any(db.execute(f"SELECT 1 FROM {table} WHERE id = ?", (key,)).fetchone() for key in keys)


def _bad(place: str, reason: str) -> Fault:
    return Fault(400, f"{place}: {reason}", code="invalid_value", param=place)
