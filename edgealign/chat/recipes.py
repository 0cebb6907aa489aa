"""The knobs of `edgealign chat` and `edgealign app`. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option
from edgealign.runtimes.recipes import Sampling


@dataclass(frozen=True, kw_only=True)
class TalkRecipe(Sampling):
    """How the next token is drawn, and what stands around a conversation."""

    repetition_penalty: float = option(
        1.15, help="above 1 makes tokens already seen less likely (CTRL, arXiv 1909.05858, section 4.1)", gt=0,
        source="tried on the starter: at 1.05 it says one sentence twice, at 1.3 it leaves the subject",
    )  # fmt: skip
    system: str = option("", help="the system turn: what kind of answers are wanted")
    context: int | None = option(
        None, ge=32, unit="tokens", help="beyond it a conversation's oldest turns go; none: the model's own context"
    )
    threads: int = option(0, ge=0, help="CPU threads; 0: all this process may use")


@dataclass(frozen=True, kw_only=True)
class ChatRecipe(TalkRecipe):
    """A conversation in the terminal or a pipe."""

    memory: bool = option(
        False, help="the lines of a pipe are one conversation; otherwise each starts a new one. A terminal remembers"
    )


@dataclass(frozen=True, kw_only=True)
class AppRecipe(TalkRecipe):
    """What a request to the assistant leaves out, and how many may wait."""

    seed: int = option(0, ge=0, help="for requests that name none; 0: another one for each")
    queue: int = option(16, ge=0, help="requests that wait while one is answered; one more is refused")
