"""One SQLite file: what was said, and what the user thought of it. What is acknowledged is on the disk.

    store = Store(folder)                       # refuses a folder that another server has open
    with store.write() as db: db.execute(...)   # returns after the commit was flushed (WAL, synchronous=FULL)

One connection behind a lock: SQLite before 3.51.3 can corrupt a WAL that two connections write and checkpoint at once
(the WAL-reset bug, 3.7.0 to 3.51.2), and Debian's is older. Deleted text is overwritten (secure_delete) and leaves
the WAL with `scrub`. Functions over this file: `conversations`, `preferences`, `transfer`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgealign.errors import InputError, UsageError, writing

APPLICATION = 0x45444741  # "EDGA": no other program's file is touched
LOCK = "assistant.lock"
SCHEMA = 3
TABLES = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, user TEXT NOT NULL, system TEXT NOT NULL,
    created_s REAL NOT NULL, updated_s REAL NOT NULL, head TEXT
) STRICT;
CREATE INDEX conversations_by_time ON conversations (updated_s DESC, id);
CREATE TABLE messages (
    id TEXT PRIMARY KEY,
    conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
    parent TEXT REFERENCES messages ON DELETE CASCADE,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    content TEXT NOT NULL,
    created_s REAL NOT NULL,
    facts TEXT NOT NULL
) STRICT;
CREATE INDEX messages_by_conversation ON messages (conversation, created_s);
CREATE INDEX messages_by_parent ON messages (parent);
CREATE TABLE feedback (
    message TEXT PRIMARY KEY REFERENCES messages ON DELETE CASCADE,
    rating INTEGER NOT NULL CHECK (rating IN (-1, 1)),
    reasons TEXT NOT NULL, comment TEXT NOT NULL, created_s REAL NOT NULL
) STRICT;
CREATE TABLE comparisons (
    id TEXT PRIMARY KEY,
    prompt TEXT NOT NULL REFERENCES messages ON DELETE CASCADE,
    left_answer TEXT NOT NULL REFERENCES messages ON DELETE CASCADE,
    right_answer TEXT NOT NULL REFERENCES messages ON DELETE CASCADE,
    source TEXT NOT NULL CHECK (source IN ('compare', 'edit')),
    choice TEXT CHECK (choice IN ('left', 'right', 'tie')),
    created_s REAL NOT NULL, chosen_s REAL
) STRICT;
CREATE INDEX comparisons_by_prompt ON comparisons (prompt);
CREATE INDEX comparisons_by_left ON comparisons (left_answer);
CREATE INDEX comparisons_by_right ON comparisons (right_answer);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
# What an answer is worth in each direction of a basis (numbers, no text); how far a user wants their taste followed.
SINCE_2 = """
CREATE TABLE features (
    message TEXT PRIMARY KEY REFERENCES messages ON DELETE CASCADE, key TEXT NOT NULL, numbers BLOB NOT NULL
) STRICT;
CREATE TABLE strengths (user TEXT PRIMARY KEY, strength REAL NOT NULL) STRICT;
"""
# Why a user's version in use is in use, where a LoRA and numbers were compared.
SINCE_3 = "CREATE TABLE decisions (user TEXT PRIMARY KEY, reason TEXT NOT NULL) STRICT;"


class Store:
    """The file `assistant.db` in a folder of the user's own; nobody else may read it.

    Raises:
        UsageError: another server has it open.
        InputError: it is no database of the assistant, damaged, or a newer edgealign's.
    """

    def __init__(self, folder: Path) -> None:
        with writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.file = folder / "assistant.db"
        self._lock = threading.Lock()
        with writing(folder):
            self._held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._held)
            reason = "is open in another edgealign app"
            raise UsageError(folder, reason, "use that one, or give this one its own --home") from error
        try:
            os.close(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._settle()
        except sqlite3.DatabaseError as error:
            os.close(self._held)
            raise InputError(self.file, f"is no database of the assistant ({error})", "move it away") from error
        except BaseException:
            os.close(self._held)
            raise

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk when this returns, or none of it ever."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """The connection, for queries of one moment."""
        with self._lock:
            yield self._db

    def scrub(self) -> None:
        """Take what was deleted out of the WAL too."""
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with self._lock:
            self._db.close()
            os.close(self._held)

    def _settle(self) -> None:
        """Pragmas, then a new file's tables, or the check that this is a file of ours."""
        db = self._db
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != APPLICATION:
            raise InputError(self.file, "is another program's database", "move it away, or give another --home")
        if version > SCHEMA:
            fix = "update edgealign, or give another --home"
            raise InputError(self.file, f"has schema {version}, this edgealign knows {SCHEMA}", fix)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        db.execute("PRAGMA secure_delete=ON")
        if not tables:
            made = f"PRAGMA application_id={APPLICATION}; {TABLES} {SINCE_2} {SINCE_3}"
        else:
            made = (SINCE_2 if version < 2 else "") + (SINCE_3 if version < 3 else "")
        if made:
            db.executescript(f"BEGIN; PRAGMA user_version={SCHEMA}; {made} COMMIT;")
        if (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise InputError(self.file, f"is damaged ({verdict})", "restore it from a copy, or move it away")
