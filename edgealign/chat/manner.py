"""How a conversation speaks as one published user, whatever the method that fitted them.

    follow(conversation, users.user("ana").adapter, kept=users.private("ana"))      # None: as everybody

| format | what is done with it |
|---|---|
| peft | a LoRA, also a mix: switched on in the session, converted for a bundle that was there before the user |
| direction | the same, a control vector |
| preference | the next token is tilted; needs the basis |
| shots | the choices stand in front of every prompt, the state behind them is kept |
| linear | the sentence stands in the system turn, and two streams are mixed |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgealign.artifact import MANIFEST, Artifact
from edgealign.chat.conversation import Conversation
from edgealign.errors import UsageError
from edgealign.personalize.adapter import check_adapter_place, open_adapter
from edgealign.personalize.basis import OpenBasis
from edgealign.personalize.embedding import Preference, read_preference
from edgealign.personalize.fspo import enter, open_shots
from edgealign.personalize.linear import MixedSession
from edgealign.personalize.shots import with_shots
from edgealign.personalize.stated import read_stated
from edgealign.personalize.tilt import Tilt, sentence_ends, whole
from edgealign.progress import say
from edgealign.runtimes.convert import as_runtime_reads
from edgealign.runtimes.session import Snapshots, runtime_of

if TYPE_CHECKING:
    from edgealign.runtimes.generate import LogitsHook

PREFERENCE = "preference"  # the format of an embedding


def follow(
    conversation: Conversation, adapter: Path | None, *, kept: Path, basis: Callable[[], OpenBasis]
) -> None:  # fmt: skip
    """Speak as this user from now on. Turns stay; who comes next should reset them.

    Args:
        adapter: what `edgealign personalize` published, or any LoRA in PEFT layout; None: as everybody.
        kept: a folder for what is made of it: it holds what the model remembers of a user, and goes when they go.
        basis: opens the model's, which an embedding needs.

    Raises:
        UsageError: this runtime cannot, or the adapter is of another model; answers are then everybody's.
    """
    conversation.plain()
    if adapter is None:
        return
    if not (adapter / MANIFEST).is_file() and runtime_of(conversation.place) == "torch":  # somebody else's LoRA
        conversation.session.set_user(adapter)
        return
    artifact = open_adapter(adapter)
    check_adapter_place(artifact, conversation.place)
    known = artifact.manifest.format
    if known == PREFERENCE:
        shared = basis()
        preference = read_preference(adapter, shared)
        conversation.hooks = lambda: tilting(conversation, shared, preference)[1]
    elif known in WAYS:
        WAYS[known](conversation, artifact, kept)
    else:
        reason = f"is a {known} adapter, which no conversation follows"
        raise UsageError(adapter, reason, "give what edgealign personalize has published")


def tilting(conversation: Conversation, basis: OpenBasis, known: Preference) -> tuple[Tilt, Sequence[LogitsHook]]:
    """The tilt of one answer and the hooks that make it; without any where the taste is not to be followed."""
    tilt = Tilt.of(basis, known.weights, strength=conversation.recipe.taste * known.scale)
    return tilt, (whole_tilt(conversation, tilt),) if tilt.strength else ()


def whole_tilt(conversation: Conversation, tilt: Tilt) -> LogitsHook:
    return whole(tilt, [conversation.end], sentence_ends(conversation.tokenizer))


def _switch(conversation: Conversation, artifact: Artifact, kept: Path) -> None:
    conversation.session.set_user(as_runtime_reads(artifact.path, conversation.place, kept=kept))


def _show(conversation: Conversation, artifact: Artifact, kept: Path) -> None:
    if isinstance(conversation.session, MixedSession):
        raise UsageError("--preference", "must begin every prompt, and so must these choices", "give one of the two")
    shots = open_shots(artifact.path, conversation.place)
    prefix = shots.prefix(conversation.tokenizer)
    if len(prefix) >= conversation.context:
        reason = f"its choices take {len(prefix):,} tokens, and the context holds {conversation.context:,}"
        raise UsageError(artifact.path, reason, "publish fewer: --shots, or a larger --context")

    def begin(prompt: Sequence[int]) -> int:
        """A conversation with a system turn of its own has another beginning, and is fed whole."""
        if tuple(prompt[: len(prefix)]) != prefix or not isinstance(conversation.session, Snapshots):
            conversation.session.reset()
            return 0
        enter(conversation.session, prefix, states=kept)
        return len(prefix)

    conversation.frame = lambda messages: with_shots(messages, shots.shots)
    conversation.begin = begin
    if not isinstance(conversation.session, Snapshots):
        name = type(conversation.session).__name__
        say(f"{name} cannot keep a state: {len(prefix)} tokens of choices are fed again in every conversation")


def _state(conversation: Conversation, artifact: Artifact, kept: Path) -> None:
    stated = read_stated(artifact.path)
    if conversation.given.preference is not None:
        raise UsageError("--preference", "is stated, and this user's is another one", "leave one of the two out")
    conversation.prefer(stated.preference, stated.strength)


WAYS: Mapping[str, Callable[[Conversation, Artifact, Path], None]] = {
    "peft": _switch, "direction": _switch, "shots": _show, "linear": _state,
}  # fmt: skip

