"""One person at the terminal: what they choose shapes the next answer, at once.

    edgealign chat --user ana            then /compare, /why, /undo, /user NAME

Choices and versions are those of `edgealign users`. Answers are read and shaped by a basis (`edgealign basis`); for the
starter one is there. A version of another method (`edgealign users add`) is spoken with as it is (manner.py), and stays
in use: choices are then kept, and nothing is learned here.

Shape legend: k choices, B rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgealign.chat.conversation import Conversation
from edgealign.chat.manner import follow, tilting, whole_tilt
from edgealign.data.forms import Pair
from edgealign.errors import UsageError
from edgealign.personalize.basis import OpenBasis, basis_of_model
from edgealign.personalize.choices import drop_repetitions
from edgealign.personalize.embedding import Preference, project, read_preference
from edgealign.personalize.in_place import Learned, learn
from edgealign.personalize.recipes import MAX_CHOICES, TASTE, EmbeddingRecipe
from edgealign.personalize.tilt import Tilt, apart
from edgealign.personalize.users import User, Users, UserVersion

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.generate import LogitsHook

    Floats = npt.NDArray[np.float64]

READ_TOKENS = EmbeddingRecipe().max_tokens  # of a prompt its end, of an answer its beginning


class Taste:
    """Of whoever is speaking.

    Args:
        basis: or why there is none: then nothing is learned, and a version on a basis cannot be used.

    Raises:
        UsageError: the version in use is none that shapes answers here.
    """

    def __init__(self, users: Users, basis: OpenBasis | UsageError, conversation: Conversation, name: str) -> None:
        self.users, self._basis, self.conversation, self.name = users, basis, conversation, name
        self.version: UserVersion | None = None
        self._known: Preference | None = None
        self._tilt: Tilt | None = None  # of the last answer
        self._rows: dict[Pair, Floats] = {}
        users.private(name, make=True)  # a name that is none is refused now
        self._load()

    @property
    def basis(self) -> OpenBasis:
        """
        Raises:
            UsageError: there is none for this model.
        """
        if isinstance(self._basis, UsageError):
            raise self._basis
        return self._basis

    @property
    def learns(self) -> bool:
        """Whether a choice makes another version: where the one in use is weights on a basis, or none is."""
        return self.version is None or self.version.method == "lore"

    def compare(self, asked: str) -> list[str]:
        """Two answers that differ where this user is known least."""
        if not self.learns:
            return self.conversation.alternatives(asked, [(), ()])
        known = self._known or Preference(np.zeros(self.rank), np.eye(self.rank), self.basis.digest)
        strength = self.conversation.recipe.taste or TASTE
        both = apart(self.basis, known.weights, known.covariance, strength=strength * known.scale)
        return self.conversation.alternatives(asked, [[whole_tilt(self.conversation, tilt)] for tilt in both])

    def choose(self, asked: str, chosen: str, rejected: str) -> Learned:
        """Remember a choice, and learn from all of them."""
        self.users.add_choice(self.name, Pair(self.conversation.heard(asked), chosen, rejected))
        if self.version is not None and not self.learns:
            reason = f"version {self.version.number}, a {self.version.method}, stays in use: edgealign personalize"
            return Learned(self._user().choices, self.version.words, reason=reason)
        pairs = drop_repetitions(self.users.choices(self.name))[0][-MAX_CHOICES:]
        if self.version is not None and self.version.choices > len(pairs):
            reason = (
                f"version {self.version.number} is of {self.version.choices} choices and stays: only {len(pairs)} "
                "are in the registry; edgealign app brings those of its page"
            )
            return Learned(len(pairs), self.version.words, reason=reason)
        rows = np.stack([self._row(pair) for pair in pairs])
        learned = learn(self.users, self.name, self.basis, pairs, rows)
        self._load()
        return learned

    def why(self) -> list[str]:
        """What shaped the last answer, in words."""
        user = self._user()
        count = f"{user.choices} choices so far"
        if self.version is None:
            return [f"{self.name}: {count}, and answers are as for everybody; /compare asks for a choice"]
        version = self.version
        if not self.learns:
            words = f"{version.words}, " if version.words else ""
            return [f"{self.name}: {words}by the {version.method} of version {version.number}; {count}"]
        lines = [
            f"{self.name}: {version.words or 'as everybody'} (version {version.number}, from {version.choices} of "
            f"{count}; followed with strength {self.conversation.recipe.taste:g})"
        ]
        if version.score is not None and version.population is not None:
            lines.append(
                f"each choice foreseen from the others: log-loss {version.score:.3f}, for everybody "
                f"{version.population:.3f} (less is better)"
            )
        if self._tilt is not None and self._tilt.paid:
            lines.append(f"the last answer was moved by {self._tilt.mean_kl_nats:.2f} nats a token")
        return lines

    def undo(self) -> UserVersion | None:
        """Back to the version before the one in use; None: to everybody's.

        Raises:
            UsageError: answers are everybody's already.
        """
        user = self._user()
        if not user.active:
            raise UsageError(self.name, "has no version in use", "/compare makes one")
        earlier = max((each.number for each in user.versions if each.number < user.active), default=0)
        self.users.rollback(self.name, earlier)
        self._load()
        return self.version

    @property
    def rank(self) -> int:
        return self.basis.folded.rank

    def _user(self) -> User:
        return self.users.user(self.name)

    def _load(self) -> None:
        """The version that the registry says is in use."""
        user = self._user()
        self.version = next((each for each in user.versions if each.number == user.active), None)
        self._known = self._tilt = None
        adapter = None if self.version is None or self.learns else self.version.folder
        follow(self.conversation, adapter, kept=self.users.private(self.name), basis=lambda: self.basis)
        if self.version is not None and self.learns:
            self._known = read_preference(self.version.folder, self.basis)
        if self.learns:
            self.conversation.hooks = self._hooks

    def _hooks(self) -> Sequence[LogitsHook]:
        self._tilt = None
        if self._known is None:
            return ()
        self._tilt, hooks = tilting(self.conversation, self.basis, self._known)
        return hooks

    def _row(self, pair: Pair) -> Floats:
        """(B + 1,) of a choice, read once."""
        if pair not in self._rows:
            conversation = self.conversation
            conversation.unsettle()
            self._rows[pair] = project(self.basis, conversation.session, conversation.tokenizer, pair, READ_TOKENS)
        return self._rows[pair]


def open_taste(users: Users, conversation: Conversation, name: str, basis: str | Path | None) -> Taste:
    """With this basis, or the one that comes with the starter. Whoever has a version needs none to speak with it.

    Raises:
        UsageError: no basis for this model, no name, or a preference is mixed into the answers already.
    """
    given = conversation.given
    if given.preference is not None and given.strength != 0.0:
        raise UsageError("--preference", "takes two streams, which a taste cannot read", "give one of the two")
    shared: OpenBasis | UsageError
    try:
        shared = basis_of_model(conversation.base_digest, basis)
    except UsageError as error:
        if basis is not None or name not in users.names() or not users.user(name).versions:
            raise
        shared = error
    return Taste(users, shared, conversation, name)
