"""A conversation over any session: turns, a system turn, what still fits, and one answer at a time.

The session keeps its state between turns: where the new prompt begins with what was fed already, only the rest is
fed. After an answer was interrupted the state is unknown, so it is emptied and the next turn feeds everything.

What is typed is text: somebody may ask about `<|im_end|>` without ending their turn, and so may the system turn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import MANIFEST, open_artifact
from edgealign.chat.recipes import ChatRecipe
from edgealign.chat.stream import TextStream
from edgealign.data.forms import Message
from edgealign.errors import InputError, UsageError
from edgealign.personalize.linear import MixedSession, Mixing, find_lead, system_text
from edgealign.personalize.steering_recipe import STRENGTH
from edgealign.personalize.users import shred

if TYPE_CHECKING:
    from edgealign.runtimes.generate import LogitsHook
    from edgealign.runtimes.session import Session

DEFAULT_MODEL = "starter"
DEFAULT_CONTEXT = 4096  # where a model's config names none


@dataclass(frozen=True)
class Reply:
    """One answer. `finish`: "stop", "length" or "cancelled"; `dropped`: turns that no longer fitted."""

    text: str
    tokens: int
    finish: str
    seconds: float
    ttft_s: float
    dropped: int


class Conversation:
    """Turns with one model; `context` is what prompt and answer may hold, in tokens."""

    def __init__(
        self, session: Session, tokenizer: Any, recipe: ChatRecipe, *, context: int, base_digest: str | None = None,
        place: Path | None = None, reopen: Callable[[ChatRecipe], Session] | None = None,
    ) -> None:  # fmt: skip
        from edgealign.data.encode import end_of_turn_id

        self.session, self.tokenizer, self.recipe, self.context = session, tokenizer, recipe, context
        self.base_digest = base_digest  # of the model in torch
        self.place = place or Path()  # of the model or the bundle
        self.given = recipe  # as everybody has it
        self.made: Path | None = None  # a folder that goes with the conversation
        self._reopen = reopen
        self.system = ""
        self.turns: list[Message] = []
        self._shape()
        self._fed: list[int] = []
        self._asked = 0
        self.end = end_of_turn_id(tokenizer)
        self.reset(system=recipe.system)

    def ask(self, text: str, write: Callable[[str], object]) -> Reply:
        """Answer, and remember both turns. `write` gets the answer's text in pieces, each of whole characters.

        An interrupt (Ctrl-C) ends the answer and not the program: what was said until then is the answer.

        Raises:
            InputError: the text is empty, is not UTF-8, or does not fit; nothing changed.
        """
        from edgealign.runtimes.generate import generate

        prompt, dropped = self._prompt(Message("user", _checked(text)))
        room = min(self.recipe.max_tokens, self.context - len(prompt))
        sampling = replace(self.recipe, max_tokens=room, seed=self.recipe.seed + self._asked)
        hooks = self.hooks()
        known = len(self._fed)
        if not known or prompt[:known] != self._fed or known == len(prompt):
            known = self.begin(prompt)
        self._fed = []  # until the answer is through, nobody knows
        stream, count = TextStream(self.tokenizer), 0

        def on_token(token: int) -> None:
            nonlocal count
            count += 1
            if piece := stream.push(token):
                write(piece)

        start_s = time.perf_counter()
        finish, ttft_s = "cancelled", 0.0
        try:
            made = generate(
                self.session, prompt[known:], before=prompt[:known], sampling=sampling, stop={self.end},
                hooks=hooks, on_token=on_token,
            )
        except KeyboardInterrupt:
            pass
        else:
            finish, ttft_s = made.finish, made.ttft_s
            self._fed = [*prompt, *(made.tokens if made.finish == "stop" else made.tokens[:-1])]
        self._asked += 1
        self._remember(text, stream.text, dropped)
        return Reply(stream.text.rstrip(), count, finish, time.perf_counter() - start_s, ttft_s, dropped)

    def alternatives(self, text: str, hooks: Sequence[Sequence[LogitsHook]]) -> list[str]:
        """One answer to the same question for each of `hooks`. None is remembered: `take` the better one.

        Raises:
            InputError: as `ask`.
        """
        from edgealign.runtimes.generate import generate

        prompt, _ = self._prompt(Message("user", _checked(text)))
        room = min(self.recipe.max_tokens, self.context - len(prompt))
        self.unsettle()
        found = []
        for number, each in enumerate(hooks):
            known = self.begin(prompt)
            self._asked += 1
            sampling = replace(self.recipe, max_tokens=room, seed=self.recipe.seed + self._asked + 1000 * number)
            made = generate(
                self.session, prompt[known:], before=prompt[:known], sampling=sampling, stop={self.end}, hooks=each
            )
            found.append(str(self.tokenizer.decode(made.tokens, skip_special_tokens=True)).strip())
        return found

    def heard(self, text: str) -> tuple[Message, ...]:
        """What a question stands at the end of: the system turn, all turns, and itself."""
        system = system_text(self.recipe.preference or "", self.system)
        return (*([Message("system", system)] if system else []), *self.turns, Message("user", text))

    def take(self, asked: str, answered: str) -> None:
        """Go on as if this had been the answer."""
        self._remember(asked, answered, 0)

    def retract(self) -> tuple[str, str] | None:
        """Take the last question and its answer back, and return them; None if there are none."""
        if not self.turns:
            return None
        asked, answered = (turn.content for turn in self.turns[-2:])
        self.turns = self.turns[:-2]
        self.unsettle()
        return asked, answered

    def unsettle(self) -> None:
        """Somebody else used the session: the next answer feeds everything."""
        self._fed = []

    def plain(self) -> None:
        """Speak as everybody: no adapter, nothing that shapes answers, the preference that was given if any."""
        self._shape()
        if self.recipe is not self.given:
            self._open_with(self.given)
        self.session.set_user(None)
        self.unsettle()

    def prefer(self, preference: str, strength: float) -> None:
        """Follow a stated preference; `plain` ends it.

        Raises:
            InputError: the model's template cannot state one; nothing changed.
        """
        find_lead(self.tokenizer, preference, self.system)
        self._open_with(replace(self.given, preference=preference, strength=strength))

    def close(self) -> None:
        """Free the model, and overwrite what was made of an adapter for this conversation only."""
        self.session.close()
        if self.made is not None:
            shred(self.made)

    def reset(self, *, system: str | None = None) -> None:
        """Forget every turn, and take another system turn if one is given.

        Raises:
            InputError: the system turn is not UTF-8, or the preference cannot be stated; nothing changed.
        """
        if system:
            _checked(system, "system turn")
        if system is not None and self.recipe.preference is not None:
            lead = find_lead(self.tokenizer, self.recipe.preference, system)
            if isinstance(self.session, MixedSession):
                self.session.prefer(lead)
        self.system = self.system if system is None else system
        self.turns, self._fed, self._asked = [], [], 0

    def _prompt(self, asked: Message) -> tuple[list[int], int]:
        """What to feed, and how many of the oldest turns have to go for it."""
        from edgealign.data.encode import encode_prompt

        def encode(messages: Sequence[Message]) -> Sequence[int]:
            return encode_prompt(self.tokenizer, self.frame(messages), typed=True)

        system = system_text(self.recipe.preference or "", self.system)
        head = [Message("system", system)] if system else []
        return fit_prompt(encode, head, self.turns, asked, max_tokens=self.recipe.max_tokens, context=self.context)

    def _shape(self) -> None:
        """Nothing shapes answers."""
        self.hooks: Callable[[], Sequence[LogitsHook]] = tuple
        self.frame: Callable[[Sequence[Message]], Sequence[Message]] = tuple  # what stands around the turns
        # Empties the session before a prompt is fed; how many of its tokens are in the state already.
        self.begin: Callable[[Sequence[int]], int] = self._empty

    def _empty(self, _: Sequence[int]) -> int:
        self.session.reset()
        return 0

    def _open_with(self, recipe: ChatRecipe) -> None:
        """Another session on the same model. The old one goes first: two may not fit."""
        assert self._reopen is not None, "a conversation that nobody can open again"
        self.session.close()
        self.session, self.recipe = self._reopen(recipe), recipe
        if isinstance(self.session, MixedSession):
            self.session.prefer(find_lead(self.tokenizer, str(recipe.preference), self.system))
        self.unsettle()

    def _remember(self, asked: str, answered: str, dropped: int) -> None:
        """Both turns, or neither where nothing was said: a template need not know an empty answer."""
        self.turns = self.turns[dropped:]
        if kept := answered.strip():
            self.turns += [Message("user", asked), Message("assistant", kept)]


def fit_prompt(
    encode: Callable[[Sequence[Message]], Sequence[int]], head: Sequence[Message], turns: Sequence[Message],
    asked: Message, *, max_tokens: int, context: int,
) -> tuple[list[int], int]:  # fmt: skip
    """What to feed for a question, and how many of the oldest turns have to go for it.

    Turns go until the longest answer fits, or half the context where that is less. The head, a system turn, stays.

    Raises:
        InputError: the question alone leaves no room for an answer.
    """
    wanted = min(max_tokens, context // 2)
    dropped = 0
    while True:
        prompt = encode((*head, *turns[dropped:], asked))
        if len(prompt) + wanted <= context or dropped == len(turns):
            break
        dropped += 2  # a question and its answer
    if len(prompt) >= context:
        raise InputError(
            "prompt", f"its {len(prompt):,} tokens leave no room for an answer in {context:,}",
            "shorten it, or --system",
        )
    return list(prompt), dropped


def open_conversation(
    recipe: ChatRecipe, *, model: str | None = None, bundle: Path | None = None, adapter: str | None = None,
    basis: str | None = None,
) -> Conversation:  # fmt: skip
    """A conversation with a model in torch, or with a bundle in its own runtime; neither is the starter.

    Args:
        adapter: a directory that `edgealign personalize` published, of any method; or the name of a bundle's user.
        basis: what users differ in, for an adapter that is weights on one; None: the starter's.

    Raises:
        UsageError: model and bundle, an adapter that belongs to neither, or a strength without a preference.
        InputError, ArtifactError, ToolMissing: it cannot be opened.
    """
    from edgealign.models.load import load_tokenizer, read_config, resolve_model
    from edgealign.runtimes.session import bundle_adapter, read_bundle

    if recipe.strength is not None and recipe.preference is None:
        raise UsageError(f"strength {recipe.strength:g}", "has no preference to strengthen", "add --preference TEXT")
    options: dict[str, Any] = {"threads": recipe.threads or None}
    user: Path | None = None
    digest: str | None = None
    if bundle is not None:
        if model is not None:
            raise UsageError(bundle, "is a bundle, and a --model is given too", "give one of them")
        opened = read_bundle(bundle)
        folder = opened.path
        digest = open_artifact(folder, check_digests=False).meta.get("model_digest")
        if adapter is not None and (adapter in opened.adapters or not Path(adapter).is_dir()):
            user, adapter = bundle_adapter(opened, adapter), None
        options |= {"context": recipe.context, "check_digests": False}
    else:
        folder = resolve_model(model or DEFAULT_MODEL)
        if (folder / MANIFEST).is_file():
            digest = open_artifact(folder, kind="model").digest
    tokenizer = load_tokenizer(folder)

    def reopen(recipe: ChatRecipe) -> Session:
        return _open(folder, tokenizer, recipe, options)

    session = reopen(recipe)
    try:
        session.set_user(user)
        own = getattr(session, "context", None) or read_config(folder).get("max_position_embeddings") or DEFAULT_CONTEXT
        room = min(int(own), recipe.context or int(own))
        conversation = Conversation(
            session, tokenizer, recipe, context=room, base_digest=digest, place=folder, reopen=reopen
        )  # fmt: skip
    except BaseException:
        session.close()
        raise
    if adapter is not None:
        _dress(conversation, Path(adapter), basis)
    return conversation


def _dress(conversation: Conversation, adapter: Path, basis: str | None) -> None:
    """Speak as the user of an adapter; what is made of it goes when the conversation does."""
    from edgealign.chat.manner import follow
    from edgealign.personalize.basis import basis_of_model

    try:
        conversation.made = Path(tempfile.mkdtemp(prefix="edgealign-"))
        follow(
            conversation, adapter, kept=conversation.made,
            basis=lambda: basis_of_model(conversation.base_digest, basis),
        )  # fmt: skip
    except BaseException:
        conversation.close()
        raise


def _open(folder: Path, tokenizer: Any, recipe: ChatRecipe, options: dict[str, Any]) -> Session:
    """A session, or two mixed streams where a preference is to be followed further than its prompt is."""
    from edgealign.runtimes.session import open_session
    from edgealign.runtimes.streams import open_streams

    strength = STRENGTH if recipe.strength is None else recipe.strength
    if recipe.preference is None or strength == 0.0:
        return open_session(folder, **options)
    lead = find_lead(tokenizer, recipe.preference, recipe.system)
    return MixedSession(open_streams(folder, **options), lead, Mixing(strength))


def _checked(text: str, name: str = "prompt") -> str:
    if not text.strip():
        raise InputError(name, "is empty", "type some words")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(name, "is not UTF-8 text", "check the terminal's encoding") from error
    return text
