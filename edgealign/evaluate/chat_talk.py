"""Asking a session many things, each from an empty state, and comparing two sessions' first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgealign.data.forms import Message
from edgealign.data.styles import STYLES
from edgealign.evaluate.chat_prompts import Prompt
from edgealign.evaluate.recipes import ChatRecipe
from edgealign.progress import Advance
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling

if TYPE_CHECKING:
    from edgealign.runtimes.session import Session

TIE_NATS = 0.1  # two tokens nearer than this in log-probability are called a tie


@dataclass(frozen=True)
class Answer:
    """What was said, and whether the model ended its turn itself."""

    text: str
    tokens: tuple[int, ...]
    ended: bool

    def first(self, count: int, end: int) -> tuple[int, ...]:
        """The first tokens; the end of the turn is one of them."""
        return (*self.tokens, end)[:count] if self.ended else self.tokens[:count]


@dataclass(frozen=True)
class Talk:
    """A session that is asked many things, each from an empty state."""

    session: Session
    tokenizer: Any
    recipe: ChatRecipe
    end: int
    advance: Advance

    def all(self, conversations: Sequence[Sequence[Message]], how: str) -> list[Answer]:
        return [self.one(messages, self._sampling(how, number)) for number, messages in enumerate(conversations)]

    def one(self, messages: Sequence[Message], sampling: Sampling) -> Answer:
        from edgealign.data.encode import encode_prompt

        self.session.reset()
        said = generate(self.session, encode_prompt(self.tokenizer, messages), sampling=sampling, stop={self.end})
        self.advance(1, "")
        return Answer(str(self.tokenizer.decode(said.tokens)).strip(), said.tokens, said.finish == "stop")

    def styles(self, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
        """Greedy answers with each style's system turn; its phrasings take turns."""
        found = {}
        for name, style in STYLES.items():
            asked = [
                (Message("system", style.requests[number % len(style.requests)]), *prompt.messages)
                for number, prompt in enumerate(prompts)
            ]
            found[name] = [answer.text for answer in self.all(asked, "greedy")]
        return found

    def _sampling(self, how: str, number: int) -> Sampling:
        if how == "greedy":
            return Sampling(
                max_tokens=self.recipe.max_new_tokens, temperature=0.0, min_p=0.0, repetition_penalty=1.0
            )
        return Sampling(
            max_tokens=self.recipe.max_new_tokens, temperature=self.recipe.temperature, min_p=self.recipe.min_p,
            repetition_penalty=self.recipe.repetition_penalty, seed=self.recipe.seed + number,
        )  # fmt: skip


@dataclass(frozen=True)
class Compare:
    """The first `count` greedy tokens of a bundle against torch's."""

    torch: Session
    tokenizer: Any
    end: int
    count: int

    def all(self, pairs: Sequence[tuple[Prompt, Answer, Answer]]) -> dict[str, Any]:
        found = [self.one(number, *pair) for number, pair in enumerate(pairs)]
        differences = [entry for entry in found if entry is not None]
        return {"same": len(pairs) - len(differences), "total": len(pairs), "differences": differences}

    def one(self, number: int, prompt: Prompt, ours: Answer, theirs: Answer) -> dict[str, Any] | None:
        """Where they part and how probable both tokens were in torch there; None where they do not part."""
        import numpy as np

        from edgealign.data.encode import encode_prompt
        from edgealign.runtimes.session import score

        left, right = ours.first(self.count, self.end), theirs.first(self.count, self.end)
        if left == right:
            return None
        # One cannot be the beginning of the other: both have `count` tokens or end with the end of the turn.
        place = next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
        context = (*encode_prompt(self.tokenizer, prompt.messages), *left[:place])
        logits = score(self.torch, context)[-1].astype(np.float64)
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        gap = float(logits[left[place]] - logits[right[place]])
        mine, other = float(chances[left[place]]), float(chances[right[place]])
        return {
            "prompt": number, "position": place, "torch": self.tokenizer.decode([left[place]]),
            "bundle": self.tokenizer.decode([right[place]]), "torch_probability": mine, "bundle_probability": other,
            "gap_nats": gap, "tie": gap < TIE_NATS,
        }  # fmt: skip
