"""Who is speaking at the terminal, and the commands that are about them: /user, /compare, /why, /undo.

What a person typed comes back by the arrow keys, also the next time; it lies in the registry of users, and
`edgealign users forget` removes it with everything else. Without a user nothing that is typed is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from edgealign.chat.conversation import Conversation
from edgealign.errors import UsageError
from edgealign.progress import say

if TYPE_CHECKING:
    from edgealign.chat.taste import Taste
    from edgealign.personalize.users import Users

KEPT_LINES = 1000


class Speakers:
    """Nobody in particular, until `switch`. Leaving the block keeps what was typed."""

    def __init__(self, conversation: Conversation, basis: str | None) -> None:
        self.conversation, self._basis = conversation, basis
        self.taste: Taste | None = None
        self._users: Users | None = None
        self._lines: ModuleType | None = None

    def __enter__(self) -> Speakers:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep()
        if self._users is not None:
            self._users.close()

    def switch(self, name: str) -> None:
        """Somebody else speaks, and sees nothing of the conversation before.

        Raises:
            UsageError: no name, or no basis for this model.
        """
        from edgealign.chat.taste import open_taste
        from edgealign.personalize.users import Users

        self._users = self._users or Users()
        taste = open_taste(self._users, self.conversation, name, self._basis)
        self._keep()
        self.taste = taste
        self.conversation.reset()
        self._fill()

    def current(self) -> Taste:
        """
        Raises:
            UsageError: nobody has said who they are.
        """
        if self.taste is None:
            raise UsageError("nobody", "is known to be speaking", "say who you are: /user NAME")
        return self.taste

    def names(self) -> list[str]:
        from edgealign.personalize.users import Users

        self._users = self._users or Users()
        return self._users.names()

    def recall(self) -> None:
        """From now on lines are edited with the arrow keys."""
        with contextlib.suppress(ImportError):
            import readline

            readline.set_history_length(KEPT_LINES)
            self._lines = readline
            self._fill()

    @staticmethod
    def _file(taste: Taste) -> Path:
        return taste.users.private(taste.name) / "typed"

    def _fill(self) -> None:
        if self._lines is not None and self.taste is not None:
            self._lines.clear_history()
            with contextlib.suppress(OSError):
                self._lines.read_history_file(self._file(self.taste))

    def _keep(self) -> None:
        if self._lines is not None and self.taste is not None and self.taste.name in self.taste.users.names():
            file = self._file(self.taste)
            with contextlib.suppress(OSError):
                self._lines.write_history_file(file)
                file.chmod(0o600)


def _user(speakers: Speakers, name: str) -> None:
    if name:
        speakers.switch(name)
        say(f"{speakers.current().why()[0]}")
    else:
        known = ", ".join(speakers.names()) or "nobody yet"
        say(f"speaking: {speakers.taste.name if speakers.taste else 'nobody in particular'}; known: {known}")


def _compare(speakers: Speakers, question: str) -> None:
    """Two answers; the chosen one is the answer, and is learned from."""
    from edgealign.personalize.ask import which

    taste, conversation = speakers.current(), speakers.conversation
    last = None if question else conversation.retract()
    if not question and last is None:
        raise UsageError("/compare", "has no question to answer twice", "/compare QUESTION")
    asked = last[0] if last else question
    try:
        say("two answers are being written")
        first, second = taste.compare(asked)
        if first == second or not (first and second):
            say(f"both say the same: {first}" if first == second else "one of the two is empty")
            key = "s"
        else:
            key = which("which is more you?", first, second)
    except BaseException:
        if last:
            conversation.take(*last)
        raise
    if key not in "12":
        if last:
            conversation.take(*last)
        say("neither: nothing was learned")
        return
    chosen, rejected = (first, second) if key == "1" else (second, first)
    learned = taste.choose(asked, chosen, rejected)
    conversation.take(asked, chosen)
    why = f" ({learned.reason})" if learned.reason else ""
    say(f"{learned.choices} {'choice' if learned.choices == 1 else 'choices'}: {learned.words or 'as everybody'}{why}")


def _why(speakers: Speakers, _: str) -> None:
    for line in speakers.current().why():
        say(line)


def _undo(speakers: Speakers, _: str) -> None:
    taste = speakers.current()
    version = taste.undo()
    now = f"version {version.number}: {version.words or 'as everybody'}" if version else "as for everybody"
    say(f"answers are as with {now}" if version else f"answers are {now}; the choices are kept")


PERSONAL: Mapping[str, Callable[[Speakers, str], None]] = {
    "/user": _user, "/compare": _compare, "/why": _why, "/undo": _undo,
}  # fmt: skip
