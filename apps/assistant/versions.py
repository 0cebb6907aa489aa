"""The versions of every user's own answers, in the registry of `edgealign users`, and how far each user wants theirs.

    versions = Versions(store, home / "users")
    versions.in_use("me")                      # None: the model as it is for everybody
    with versions.scratch() as folder: ...     # overwritten and gone afterwards, and after a crash at the next start

The registry is opened for each call: `edgealign users` may work on it at the same time, and SQLite keeps them apart.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from assistant.preferences import Chosen
from assistant.store import Store
from edgealign.errors import InputError
from edgealign.personalize.recipes import TASTE
from edgealign.personalize.users import FILE, User, Users, UserVersion, scratch, shred, sweep

PAGE = "page"  # whose copies the registry's choices are


class Versions:
    """Over one store and one registry's folder, which is made when there is something to keep."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder

    @contextmanager
    def registry(self) -> Iterator[Users]:
        """The registry, which another program may have damaged since.

        Raises:
            InputError: it is none.
        """
        try:
            with Users(self.folder) as users:
                yield users
        except sqlite3.DatabaseError as error:
            fix = "restore it from a copy, or move it away"
            raise InputError(self.folder / FILE, f"is no registry ({error})", fix) from error

    def names(self) -> list[str]:
        if not (self.folder / FILE).is_file():
            return []
        with self.registry() as users:
            return users.names()

    def user(self, name: str) -> User | None:
        """What the registry knows; None: nobody of that name."""
        if not (self.folder / FILE).is_file():
            return None
        with self.registry() as users:
            return users.user(name) if name in users.names() else None

    def in_use(self, name: str) -> UserVersion | None:
        """The version in use; None: the model as it is for everybody."""
        known = self.user(name)
        return next((each for each in known.versions if each.number == known.active), None) if known else None

    def activate(self, name: str, number: int) -> None:
        with self.registry() as users:
            users.rollback(name, number)

    def add(self, name: str, adapter: Path, *, use: bool = True) -> UserVersion:
        """A copy of a published adapter becomes a version, and the one in use."""
        with self.registry() as users:
            return users.add_version(name, adapter, use=use)

    def choices(self, name: str) -> list[Chosen]:
        """What was chosen in the terminal, oldest first; no message is of it."""
        if self.user(name) is None:
            return []
        with self.registry() as users:
            return [Chosen(pair, "", "", made_s) for made_s, pair in users.dated_choices(name, but=PAGE)]

    def mirror(self, name: str, chosen: Sequence[Chosen]) -> None:
        """Make these what the registry holds of the page's choices."""
        if chosen or self.user(name) is not None:
            with self.registry() as users:
                users.mirror(name, PAGE, [(each.made_s, each.pair) for each in chosen])

    def strength(self, user: str) -> float:
        with self.store.read() as db:
            row = db.execute("SELECT strength FROM strengths WHERE user = ?", (user,)).fetchone()
        return TASTE if row is None else float(row["strength"])

    def set_strength(self, user: str, strength: float) -> None:
        with self.store.write() as db:
            db.execute("INSERT OR REPLACE INTO strengths VALUES (?, ?)", (user, strength))

    def decision(self, user: str) -> str:
        """Why the version in use is in use; empty where nothing was compared, or the user chose it."""
        with self.store.read() as db:
            row = db.execute("SELECT reason FROM decisions WHERE user = ?", (user,)).fetchone()
        return "" if row is None else str(row["reason"])

    def decide(self, user: str, reason: str) -> None:
        with self.store.write() as db:
            db.execute("INSERT OR REPLACE INTO decisions VALUES (?, ?)", (user, reason))

    def forget(self, name: str) -> int:
        """Overwrite and remove all of a user's versions, and the strength; how many versions there were."""
        with self.store.write() as db:
            db.execute("DELETE FROM strengths WHERE user = ?", (name,))
            db.execute("DELETE FROM decisions WHERE user = ?", (name,))
        self.store.scrub()
        known = self.user(name)
        if known is None:
            return 0
        for version in known.versions:
            shred(self.converted(version))
        with self.registry() as users:
            users.forget(name)
        return len(known.versions)

    def converted(self, version: UserVersion) -> Path:
        """The folder where a LoRA lies in a runtime's own format, if that is another one than PEFT's."""
        return self.folder / "converted" / version.folder.name

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder for texts and numbers on their way."""
        return scratch(self.folder)

    def sweep(self) -> None:
        """What a server that was killed has left."""
        sweep(self.folder)
