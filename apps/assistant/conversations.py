"""Conversations as trees: every message knows the one before it, and a conversation's `head` is the branch on show.

To ask again in other words is a second message under the same parent; a second answer too. Nothing is overwritten.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Mapping
from typing import Any, TypeAlias

from assistant.faults import Fault
from assistant.store import Store

Json: TypeAlias = dict[str, Any]
TITLE = 60  # characters of the first question


def create(store: Store, *, title: str, user: str, system: str) -> Json:
    """A new conversation without messages."""
    now_s, key = time.time(), uuid.uuid4().hex
    with store.write() as db:
        values = (key, title, user, system, now_s, now_s)
        db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, NULL)", values)
    return read(store, key)


def search(store: Store, *, query: str, user: str | None, limit: int, offset: int) -> list[Json]:
    """Conversations, the latest first; with a query those whose title or messages contain it, in any case of ASCII."""
    pattern = "%" + "".join(f"\\{sign}" if sign in "\\%_" else sign for sign in query) + "%"
    with store.read() as db:
        rows = db.execute(
            "SELECT c.*, (SELECT count(*) FROM messages m WHERE m.conversation = c.id) AS messages FROM conversations c"
            " WHERE (?1 IS NULL OR c.user = ?1) AND (?2 = '%%' OR c.title LIKE ?2 ESCAPE '\\' OR EXISTS (SELECT 1 FROM"
            " messages m WHERE m.conversation = c.id AND m.content LIKE ?2 ESCAPE '\\'))"
            " ORDER BY c.updated_s DESC, c.id LIMIT ?3 OFFSET ?4",
            (user, pattern, limit, offset),
        ).fetchall()
    return [dict(row) for row in rows]


def read(store: Store, conversation: str) -> Json:
    """A conversation with all messages of all branches, oldest first, and its comparisons.

    Raises:
        Fault: there is none.
    """
    with store.read() as db:
        return read_from(db, conversation)


def read_from(db: sqlite3.Connection, conversation: str) -> Json:
    """`read` inside a transaction."""
    found = _row(db, "conversations", conversation)
    rows = db.execute(
        "SELECT m.*, f.rating, f.reasons, f.comment, f.created_s AS thumbed_s FROM messages m"
        " LEFT JOIN feedback f ON f.message = m.id WHERE m.conversation = ? ORDER BY m.rowid",
        (conversation,),
    )
    messages = [as_message(row) for row in rows]
    pairs = db.execute(
        "SELECT c.* FROM comparisons c JOIN messages m ON m.id = c.prompt WHERE m.conversation = ? ORDER BY c.rowid",
        (conversation,),
    )
    return {**dict(found), "messages": messages, "comparisons": [as_comparison(row) for row in pairs]}


def update(store: Store, conversation: str, changes: Mapping[str, str]) -> Json:
    """Other title, system turn, user or head.

    Raises:
        Fault: no such conversation, or a head that is not its message.
    """
    with store.write() as db:
        _row(db, "conversations", conversation)
        if "head" in changes and _row(db, "messages", changes["head"])["conversation"] != conversation:
            raise Fault(400, "head: is no message of this conversation", code="invalid_value", param="head")
        for column in ("title", "system", "user", "head"):
            if column in changes:
                db.execute(f"UPDATE conversations SET {column} = ? WHERE id = ?", (changes[column], conversation))
    return read(store, conversation)


def delete(store: Store, conversation: str) -> None:
    """A conversation with its messages, thumbs and choices; their text is gone from the disk afterwards.

    Raises:
        Fault: there is none.
    """
    with store.write() as db:
        _row(db, "conversations", conversation)
        db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
    store.scrub()


def add_message(
    store: Store, conversation: str, *, parent: str | None, role: str, content: str, facts: Mapping[str, Any],
    key: str | None = None,
) -> Json:  # fmt: skip
    """A message under its parent; it becomes the head. `key`: an id that was announced before.

    Raises:
        Fault: no such conversation or parent, or a parent of the same side.
    """
    with store.write() as db:
        key = insert_message(db, conversation, parent=parent, role=role, content=content, facts=facts, key=key)
    return message(store, key)


def insert_message(
    db: sqlite3.Connection, conversation: str, *, parent: str | None, role: str, content: str, facts: Mapping[str, Any],
    key: str | None = None,
) -> str:  # fmt: skip
    """`add_message` inside a transaction; the new id."""
    found = _row(db, "conversations", conversation)
    if parent is not None:
        above = _row(db, "messages", parent)
        if above["conversation"] != conversation:
            raise Fault(400, "parent: is no message of this conversation", code="invalid_value", param="parent")
        if above["role"] == role:
            raise Fault(400, "parent: the two sides take turns", code="invalid_value", param="parent")
    elif role != "user":
        raise Fault(400, "parent: an answer needs its question", code="invalid_value", param="parent")
    key, now_s = key or uuid.uuid4().hex, time.time()
    db.execute(
        "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)",
        (key, conversation, parent, role, content, now_s, json.dumps(facts)),
    )
    title = found["title"] or " ".join(content.split())[:TITLE]
    db.execute(
        "UPDATE conversations SET head = ?, updated_s = ?, title = ? WHERE id = ?", (key, now_s, title, conversation)
    )
    return key


def message(store: Store, key: str) -> Json:
    """One message with its thumb.

    Raises:
        Fault: there is none.
    """
    with store.read() as db:
        _row(db, "messages", key)
        row = db.execute(
            "SELECT m.*, f.rating, f.reasons, f.comment, f.created_s AS thumbed_s FROM messages m"
            " LEFT JOIN feedback f ON f.message = m.id WHERE m.id = ?",
            (key,),
        ).fetchone()
    return as_message(row)


def path_to(store: Store, key: str) -> tuple[Json, list[Json]]:
    """A message's conversation (without messages) and the messages from its beginning to this one.

    Raises:
        Fault: there is none.
    """
    with store.read() as db:
        return path_in(db, key)


def path_in(db: sqlite3.Connection, key: str) -> tuple[Json, list[Json]]:
    """`path_to` inside a transaction."""
    _row(db, "messages", key)
    rows = db.execute(
        "WITH RECURSIVE up(id, depth) AS (VALUES (?, 0) UNION ALL SELECT m.parent, up.depth + 1 FROM messages m"
        " JOIN up ON m.id = up.id WHERE m.parent IS NOT NULL)"
        " SELECT m.* FROM messages m JOIN up ON m.id = up.id ORDER BY up.depth DESC",
        (key,),
    ).fetchall()
    return dict(_row(db, "conversations", rows[0]["conversation"])), [as_message(row) for row in rows]


def as_message(row: sqlite3.Row) -> Json:
    """A row of messages, with its thumb where the query joined one."""
    found = dict(row)
    thumb = {name: found.pop(name) for name in ("rating", "reasons", "comment", "thumbed_s") if name in found}
    found["facts"] = json.loads(found["facts"])
    rated = thumb.get("rating") is not None
    found["feedback"] = None if not rated else {
        "rating": thumb["rating"], "reasons": json.loads(thumb["reasons"]), "comment": thumb["comment"],
        "created_s": thumb["thumbed_s"],
    }  # fmt: skip
    return found


def as_comparison(row: sqlite3.Row) -> Json:
    """A row of comparisons under the API's names."""
    found = dict(row)
    return {"left": found.pop("left_answer"), "right": found.pop("right_answer"), **found}


def _row(db: sqlite3.Connection, table: str, key: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute(f"SELECT * FROM {table} WHERE id = ?", (key,)).fetchone()
    if row is None:
        raise Fault(404, f"no such {table.removesuffix('s')}", code="not_found")
    return row
