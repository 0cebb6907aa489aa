"""The knobs of `edgealign chat` and `edgealign app`. Light: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.personalize.recipes import MAX_TASTE, TASTE
from edgealign.personalize.steering_recipe import MAX_STRENGTH, STRENGTH
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
    preference: str | None = option(
        None, help="what answers should be like, followed further than --system asks for: linear alignment, two passes "
        "a token",
    )  # fmt: skip
    strength: float | None = option(
        None, ge=0, le=MAX_STRENGTH, source="demo.py of arXiv 2401.11458; docs/results/steering",
        help=f"how far to follow --preference; 0: as far as a prompt does, with one pass; none: {STRENGTH:g}",
    )  # fmt: skip
    context: int | None = option(
        None, ge=32, unit="tokens", help="beyond it a conversation's oldest turns go; none: the model's own context"
    )
    threads: int = option(0, ge=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")


@dataclass(frozen=True, kw_only=True)
class ChatRecipe(TalkRecipe):
    """A conversation in the terminal or a pipe."""

    taste: float = option(
        TASTE, ge=0, le=MAX_TASTE, help="how far the taste of --user is followed; 0: not at all",
        source="docs/results/carriers: twenty planted users of 8 choices",
    )  # fmt: skip
    memory: bool = option(
        False, help="the lines of a pipe are one conversation; otherwise each starts a new one. A terminal remembers"
    )


@dataclass(frozen=True, kw_only=True)
class AppRecipe(TalkRecipe):
    """What a request to the assistant leaves out, and how many may wait."""

    seed: int = option(0, ge=0, help="for requests that name none; 0: another one for each")
    queue: int = option(16, ge=0, help="requests that wait while one is answered; one more is refused")
