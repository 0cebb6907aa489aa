"""The people of this machine: what they chose, the versions of their adapters, and nothing of whom they had forgotten.

    users = Users()                          # EDGEALIGN_USERS, or users/ in EDGEALIGN_HOME or ~/.local/share/edgealign
    users.add_choice("ana", pair)
    users.add_version("ana", published)      # takes the directory in, and makes it the active one
    users.rollback("ana", 1)                 # 0: the population
    users.private("ana")                     # a folder for what is made of her choices: a prefix's state, for one
    users.forget("ana")

One SQLite file (full sync: what was acknowledged survives a crash) beside `adapters/` and `private/`, where a
directory's name is random and says nothing. Several programs have it open, so it has a rollback journal: a write-ahead
log with several connections can be corrupted by SQLite before 3.51.3 (the WAL-reset bug, 3.7.0 to 3.51.2). To forget
deletes with `secure_delete`, rebuilds the file and overwrites the adapters' and the private files before they are
removed: no byte is left in the registry's files. A disk's own copies (snapshots, worn cells) are out of its reach, and
so is what was exported to elsewhere.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.artifact import open_artifact
from edgealign.data.forms import Message, Pair, to_json
from edgealign.errors import InputError, OutputError, UsageError
from edgealign.registry import suggest

HOME, PLACE = "EDGEALIGN_HOME", "EDGEALIGN_USERS"
FILE = "users.sqlite"
VERSION = 2
BUSY_S = 10.0
LONGEST_NAME = 200
PASSING = ".passing-"  # how the names of folders that live for a moment begin
SCHEMA = """
CREATE TABLE users (id TEXT PRIMARY KEY, name TEXT UNIQUE NOT NULL, made_s REAL NOT NULL, active INTEGER NOT NULL);
CREATE TABLE choices (
    number INTEGER PRIMARY KEY, user TEXT NOT NULL REFERENCES users(id) ON DELETE CASCADE, made_s REAL NOT NULL,
    pair TEXT NOT NULL, source TEXT NOT NULL DEFAULT ''
);
CREATE TABLE versions (
    user TEXT NOT NULL REFERENCES users(id) ON DELETE CASCADE, number INTEGER NOT NULL, made_s REAL NOT NULL,
    method TEXT NOT NULL, digest TEXT NOT NULL, folder TEXT NOT NULL, choices INTEGER NOT NULL, words TEXT NOT NULL,
    score REAL, population REAL, PRIMARY KEY (user, number)
);
CREATE INDEX choices_of ON choices(user);
"""
SINCE_2 = "ALTER TABLE choices ADD COLUMN source TEXT NOT NULL DEFAULT ''"  # who keeps them; empty: only the registry


@dataclass(frozen=True)
class UserVersion:
    """`score` and `population`: the check's value for this adapter and for the population, in the check's unit."""

    number: int
    made_s: float
    method: str
    digest: str
    folder: Path
    choices: int
    words: str
    score: float | None
    population: float | None


@dataclass(frozen=True)
class User:
    """`active`: the number of the version in use, 0 for the population."""

    name: str
    made_s: float
    active: int
    choices: int
    versions: tuple[UserVersion, ...]

    @property
    def adapter(self) -> Path | None:
        return next((version.folder for version in self.versions if version.number == self.active), None)


class Users:
    """The registry in a directory.

    Raises:
        OutputError: it cannot be made there.
        InputError: the file there is damaged, or of a later edgealign.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or users_folder()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self.folder / FILE, timeout=BUSY_S, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise OutputError(self.folder, f"cannot hold a registry ({error})", f"name another in {PLACE}") from error
        try:
            for pragma in ("journal_mode=DELETE", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            with self._writing():
                found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
                if found == 0:
                    for statement in SCHEMA.split(";"):
                        self._db.execute(statement)
                elif found == 1:
                    self._db.execute(SINCE_2)
                if found < VERSION:
                    self._db.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.DatabaseError as error:
            fix = "restore it from a copy, or move it away"
            raise InputError(self.folder / FILE, f"is no registry ({error})", fix) from error
        if found > VERSION:
            raise InputError(self.folder / FILE, f"is of a later version ({found})", "update edgealign")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Users:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_choice(self, name: str, pair: Pair) -> None:
        """Remember what somebody chose; a new name is a new user."""
        with self._writing():
            text = json.dumps(to_json(pair), ensure_ascii=False)
            row = (self._id(name, make=True), time.time(), text)
            self._db.execute("INSERT INTO choices (user, made_s, pair) VALUES (?, ?, ?)", row)

    def choices(self, name: str) -> list[Pair]:
        """All that somebody chose, oldest first, with their name as user_id."""
        return [pair for _, pair in self.dated_choices(name)]

    def dated_choices(self, name: str, *, but: str | None = None) -> list[tuple[float, Pair]]:
        """All that somebody chose and when (seconds since 1970), oldest first.

        Args:
            but: leave out what this source keeps.
        """
        rows = self._db.execute(
            "SELECT made_s, pair FROM choices WHERE user = ? AND source IS NOT ? ORDER BY made_s, number",
            (self._id(name), but),
        ).fetchall()
        found = []
        for made_s, text in rows:
            row = json.loads(text)
            prompt = tuple(Message(each["role"], each["content"]) for each in row["prompt"])
            found.append((made_s, Pair(prompt, row["chosen"], row["rejected"], name)))
        return found

    def mirror(self, name: str, source: str, chosen: Sequence[tuple[float, Pair]]) -> None:
        """Hold exactly these dated choices of another program's: new ones are added, missing ones are gone for good."""
        if not chosen and name not in self.names():
            return
        wanted = {(made_s, json.dumps(to_json(pair), ensure_ascii=False)) for made_s, pair in chosen}
        with self._writing():
            user = self._id(name, make=True)
            rows = self._db.execute(
                "SELECT number, made_s, pair FROM choices WHERE user = ? AND source = ?", (user, source)
            ).fetchall()
            held = {(made_s, pair): number for number, made_s, pair in rows}
            gone = [(number,) for row, number in held.items() if row not in wanted]
            self._db.executemany("DELETE FROM choices WHERE number = ?", gone)
            self._db.executemany(
                "INSERT INTO choices (user, made_s, pair, source) VALUES (?, ?, ?, ?)",
                [(user, *row, source) for row in sorted(wanted - held.keys())],
            )

    def add_version(self, name: str, adapter: Path, *, use: bool = True) -> UserVersion:
        """Take a published adapter in, and make it the active one, or keep the one in use.

        Raises:
            ArtifactError: no published adapter.
        """
        artifact = open_artifact(adapter, kind="adapter")
        target = self.folder / "adapters" / secrets.token_hex(12)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        shutil.copytree(artifact.path, target)
        checks = artifact.manifest.checks
        try:
            with self._writing():
                user = self._id(name, make=True)
                last = self._db.execute("SELECT COALESCE(MAX(number), 0) FROM versions WHERE user = ?", (user,))
                number = 1 + int(last.fetchone()[0])
                count = self._db.execute("SELECT COUNT(*) FROM choices WHERE user = ?", (user,)).fetchone()[0]
                self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
                    user, number, time.time(), str(artifact.meta.get("method", "")), artifact.digest, target.name,
                    _fitted(artifact.meta, count), str(artifact.meta.get("words", "")),
                    checks[0].value if checks else None, checks[0].tolerance if checks else None,
                ))  # fmt: skip
                if use:
                    self._db.execute("UPDATE users SET active = ? WHERE id = ?", (number, user))
        except BaseException:
            shred(target)
            raise
        return self.user(name).versions[-1]

    def rollback(self, name: str, number: int) -> None:
        """Make another version the active one; 0 is the population.

        Raises:
            UsageError: there is no such version.
        """
        known = [0, *(version.number for version in self.user(name).versions)]
        if number not in known:
            raise UsageError(f"version {number}", f"is none of {name}'s", f"choose from: {', '.join(map(str, known))}")
        with self._writing():
            self._db.execute("UPDATE users SET active = ? WHERE id = ?", (number, self._id(name)))

    def private(self, name: str, *, make: bool = False) -> Path:
        """The folder for files that are made of what somebody chose or typed, and go when somebody is forgotten.

        Args:
            make: a new name is a new user.
        """
        folder = self.folder / "private" / self._id(name, make=make)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """A private folder that is overwritten and removed at the end."""
        return scratch(self.private(name))

    def forget(self, name: str) -> None:
        """Remove somebody, their choices, adapters and private files; what is removed is overwritten."""
        user = self._id(name)
        shred(self.folder / "private" / user)
        rows = self._db.execute("SELECT folder FROM versions WHERE user = ?", (user,)).fetchall()
        for (folder,) in rows:
            shred(self.folder / "adapters" / folder)
        with self._writing():
            self._db.execute("DELETE FROM users WHERE id = ?", (user,))
        self._db.execute("VACUUM")

    def names(self) -> list[str]:
        return [str(name) for (name,) in self._db.execute("SELECT name FROM users ORDER BY name")]

    def user(self, name: str) -> User:
        """All that is known of somebody.

        Raises:
            UsageError: nobody of that name.
        """
        user = self._id(name)
        _, made_s, active = self._db.execute("SELECT name, made_s, active FROM users WHERE id = ?", (user,)).fetchone()
        count = self._db.execute("SELECT COUNT(*) FROM choices WHERE user = ?", (user,)).fetchone()[0]
        rows = self._db.execute(
            "SELECT number, made_s, method, digest, folder, choices, words, score, population FROM versions "
            "WHERE user = ? ORDER BY number", (user,),
        ).fetchall()  # fmt: skip
        adapters = self.folder / "adapters"
        versions = tuple(
            UserVersion(number, at_s, method, digest, adapters / folder, chosen, words, score, population)
            for number, at_s, method, digest, folder, chosen, words, score, population in rows
        )
        return User(name, made_s, active, count, versions)

    def _id(self, name: str, *, make: bool = False) -> str:
        row = self._db.execute("SELECT id FROM users WHERE name = ?", (name,)).fetchone()
        if row:
            return str(row[0])
        if not make:
            raise UsageError(name, f"is nobody here{suggest(name, self.names())}", "see them: edgealign users list")
        if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
            reason = f"is no name (1 to {LONGEST_NAME} printable characters)"
            raise UsageError(repr(name[:40]), reason, "choose another")
        user = secrets.token_hex(12)
        self._db.execute("INSERT INTO users VALUES (?, ?, ?, 0)", (user, name, time.time()))
        return user

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all of it or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _fitted(meta: Mapping[str, Any], otherwise: int) -> int:
    """The choices that an adapter was fitted on, where its manifest says so."""
    counted = meta.get("choices")
    known = meta.get("fitted", counted.get("fitted") if isinstance(counted, dict) else None)
    return otherwise if known is None else int(known)


def home_folder() -> Path:
    """Where edgealign keeps this account's data: EDGEALIGN_HOME, or `edgealign` where programs keep theirs."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get(HOME) or data / "edgealign")


def users_folder(home: Path | None = None) -> Path:
    """Where the registry is: in a home that was given; else EDGEALIGN_USERS, or in this account's home."""
    return home / "users" if home is not None else Path(os.environ.get(PLACE) or home_folder() / "users")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder in a registry's folder for texts and numbers on their way; overwritten and gone afterwards."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder, prefix=PASSING))
    try:
        yield made
    finally:
        shred(made)


def sweep(folder: Path) -> None:
    """What a program that was killed has left of it."""
    for left in folder.glob(f"{PASSING}*"):
        shred(left)


def shred(folder: Path) -> None:
    """Overwrite and remove; a missing directory is gone already."""
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.is_file() and not file.is_symlink():
            with file.open("r+b") as opened:
                opened.write(bytes(file.stat().st_size))
                opened.flush()
                os.fsync(opened.fileno())
    shutil.rmtree(folder, ignore_errors=True)
