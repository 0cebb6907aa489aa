"""What is acknowledged is kept, exactly once; what is deleted is gone from the disk; foreign files are left alone."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from assistant import conversations, preferences, transfer
from assistant.faults import Fault
from assistant.forms import Archive
from assistant.store import SCHEMA, Store

from edgealign.data.read import read
from edgealign.errors import InputError, UsageError

from .conftest import TOKEN  # noqa: F401  (its import makes the app importable)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "home")
    yield opened
    opened.close()


def talk(store: Store, *, question: str = "What is a fox?", answer: str = "An animal.", user: str = "me") -> list[str]:
    """A conversation of two messages; [conversation, question, answer]."""
    made = conversations.create(store, title="", user=user, system="")["id"]
    asked = conversations.add_message(store, made, parent=None, role="user", content=question, facts={})["id"]
    said = conversations.add_message(store, made, parent=asked, role="assistant", content=answer, facts={"seed": 1})
    return [made, asked, said["id"]]


def bytes_on_disk(store: Store) -> bytes:
    return b"".join(file.read_bytes() for file in store.file.parent.glob("assistant.db*"))


def test_it_is_a_wal_with_full_flushes_and_readable_by_its_owner_only(store: Store) -> None:
    with store.read() as db:
        facts = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert facts == ["wal", 2, 1]
    for file in store.file.parent.glob("*"):
        assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_eight_writers_lose_and_double_nothing(store: Store, count: int) -> None:
    _, asked, _ = talk(store)
    conversation = conversations.path_to(store, asked)[0]["id"]
    faults: list[Exception] = []

    def write(writer: int) -> None:
        try:
            for number in range(count):
                key = f"{writer:016x}{number:016x}"
                conversations.add_message(
                    store, conversation, parent=asked, role="assistant", content=f"{writer} {number}", facts={}, key=key
                )
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    with store.read() as db:
        rows = {(row["id"], row["content"]) for row in db.execute("SELECT id, content FROM messages")}
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    written = {(f"{writer:016x}{number:016x}", f"{writer} {number}") for writer in range(8) for number in range(count)}
    assert written < rows
    assert len(rows) == 8 * count + 2


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    made, _, said = talk(store)

    def fail() -> None:
        with store.write() as db:
            db.execute("DELETE FROM conversations")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail()
    assert conversations.read(store, made)["head"] == said


def test_a_second_server_is_refused_and_the_first_goes_on(store: Store) -> None:
    with pytest.raises(UsageError, match="open in another"):
        Store(store.file.parent)
    assert talk(store)


@pytest.mark.parametrize("content", [b"no database, but long enough to be read as one" * 20, b"SQLite format 3\0"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "assistant.db").write_bytes(content)
    with pytest.raises(InputError):
        Store(tmp_path)
    assert (tmp_path / "assistant.db").read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "assistant.db") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(InputError, match="another program"):
        Store(tmp_path)


def test_a_newer_schema_is_refused(store: Store) -> None:
    with store.write() as db:
        db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(InputError, match="schema 99"):
        Store(store.file.parent)
    with sqlite3.connect(store.file) as db:
        db.execute(f"PRAGMA user_version={SCHEMA}")
    db.close()
    store.__init__(store.file.parent)  # type: ignore[misc]  # for the fixture to close


def test_a_store_of_the_first_version_is_taken_along(store: Store) -> None:
    kept = conversations.create(store, title="Kept", user="me", system="")["id"]
    with store.write() as db:
        db.execute("DROP TABLE features")
        db.execute("DROP TABLE strengths")
        db.execute("DROP TABLE decisions")
        db.execute("PRAGMA user_version=1")
    store.close()
    store.__init__(store.file.parent)  # type: ignore[misc]
    assert conversations.read(store, kept)["title"] == "Kept"
    with store.read() as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA
        assert db.execute("SELECT count(*) FROM features").fetchone()[0] == 0


def test_a_damaged_file_is_refused(store: Store) -> None:
    for _ in range(30):
        talk(store, question="q" * 3000)
    store.close()
    raw = bytearray(store.file.read_bytes())
    raw[4096 * 3 : 4096 * 6] = os.urandom(4096 * 3)
    store.file.write_bytes(raw)
    with pytest.raises(InputError, match=r"damaged|no database"):
        Store(store.file.parent)
    store.file.unlink()
    store.__init__(store.file.parent)  # type: ignore[misc]


def test_what_is_deleted_is_gone_from_the_disk(store: Store) -> None:
    kept = talk(store, question="keep-me-5521")
    made, _, said = talk(store, question="canary-question-8812", answer="canary-answer-8813", user="ana")
    preferences.set_feedback(store, said, rating=-1, reasons=["other"], comment="canary-comment-8814")
    preferences.edit(store, said, "canary-edit-8815")
    assert b"canary-edit-8815" in bytes_on_disk(store)
    conversations.delete(store, made)
    talk(store, question="canary-again-8816", user="ana")
    assert transfer.forget(store, "ana") == 1
    assert b"canary" not in bytes_on_disk(store)
    assert conversations.read(store, kept[0])["messages"][0]["content"] == "keep-me-5521"


def test_feedback_is_stored_once_however_often_it_is_sent(store: Store) -> None:
    _, _, said = talk(store)
    for _ in range(3):
        preferences.set_feedback(store, said, rating=1, reasons=["helpful"], comment="")
    preferences.set_feedback(store, said, rating=-1, reasons=["too_long"], comment="Too long.")
    found = conversations.message(store, said)["feedback"]
    assert (found["rating"], found["reasons"], found["comment"]) == (-1, ["too_long"], "Too long.")
    assert len(preferences.thumbs(store, None)) == 1
    preferences.clear_feedback(store, said)
    assert preferences.thumbs(store, None) == []


def test_choices_and_edits_are_pairs_that_edgealign_reads(store: Store, tmp_path: Path) -> None:
    made, asked, left = talk(store, user="ana")
    right = conversations.add_message(store, made, parent=asked, role="assistant", content="A mammal.", facts={})["id"]
    pair = preferences.compare(store, prompt=asked, left=left, right=right)
    assert preferences.pairs(store, None) == []
    preferences.choose(store, pair["id"], "tie")
    assert preferences.pairs(store, None) == []
    preferences.choose(store, pair["id"], "right")
    preferences.edit(store, left, "A clever animal.")
    conversations.update(store, made, {"system": "Be brief."})
    file = tmp_path / "choices.jsonl"
    import json

    file.write_text("".join(json.dumps(row) + "\n" for row in preferences.pairs(store, "ana")), encoding="utf-8")
    rows = read(file, form="pair").rows
    assert [(row.chosen, row.rejected, row.user_id) for row in rows] == [  # type: ignore[union-attr]
        ("A mammal.", "An animal.", "ana"), ("A clever animal.", "An animal.", "ana"),
    ]  # fmt: skip
    assert [turn.role for turn in rows[0].prompt] == ["system", "user"]  # type: ignore[union-attr]
    assert preferences.pairs(store, "ben") == []
    assert conversations.read(store, made)["head"] != left


def test_export_and_import_are_each_others_inverse(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        _, _, said = talk(store, question=f"question {number} <b>&\u2028\x00 é", user=f"user{number}")
        preferences.set_feedback(store, said, rating=1, reasons=[], comment="fine")
        preferences.edit(store, said, "better")
    exported = transfer.export(store, None)
    other = Store(tmp_path / "other")
    archive = Archive.model_validate(exported)
    assert transfer.import_all(other, archive) == {"imported": 3, "skipped": 0}
    assert transfer.import_all(other, archive) == {"imported": 0, "skipped": 3}
    assert transfer.export(other, None) == exported
    assert preferences.pairs(other, None) == preferences.pairs(store, None)
    other.close()


def test_an_archive_that_is_no_tree_is_refused_whole(store: Store, tmp_path: Path) -> None:
    good = [talk(store)[0], talk(store)[0]]
    exported = transfer.export(store, None)
    other = Store(tmp_path / "other")
    messages = exported["conversations"][1]["messages"]
    breaks = [
        lambda: messages[1].update(parent="f" * 32),
        lambda: messages[1].update(role="user"),
        lambda: messages[0].update(role="assistant"),
        lambda: messages.append(dict(messages[0])),
        lambda: messages[1].update(facts={"x": float("nan")}),
        lambda: messages[1].update(id=exported["conversations"][0]["messages"][0]["id"]),
        lambda: exported["conversations"][1].update(head="0" * 32),
    ]
    import copy

    whole = copy.deepcopy(exported)
    for broken in breaks:
        broken()
        with pytest.raises(Fault):
            transfer.import_all(other, Archive.model_validate(exported))
        assert conversations.search(other, query="", user=None, limit=10, offset=0) == []
        fresh = copy.deepcopy(whole)
        exported["conversations"][1].clear()
        exported["conversations"][1].update(fresh["conversations"][1])
        messages = exported["conversations"][1]["messages"]
    assert transfer.import_all(other, Archive.model_validate(whole)) == {"imported": len(good), "skipped": 0}
    other.close()


@pytest.mark.parametrize(
    ("query", "found"), [("FOX", 1), ("100%", 1), ("%", 1), ("_", 1), ("fo_", 0), ("nothing", 0), ("", 3), ("\\", 0)]
)
def test_search_finds_words_as_they_are(store: Store, query: str, found: int) -> None:
    talk(store)
    talk(store, question="100% of it?", answer="Yes")
    talk(store, question="snake_case?", answer="Yes")
    assert len(conversations.search(store, query=query, user=None, limit=10, offset=0)) == found
