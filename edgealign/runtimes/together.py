"""Answers to many prompts at once, each drawn as `generate` draws it, from an empty state and with its own sampling.

A runtime that has rows (torch) decodes up to ROWS prompts as one batch; a row leaves it when its answer is over. The
others answer one prompt after the other. A batch adds in another order than a single prompt does: logits differ by
rounding (1e-5 of their size in 32 bits), so that now and then another token may be drawn.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgealign.errors import UsageError
from edgealign.runtimes.generate import Generated, draw, generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

ROWS = 32


class Rows(Protocol):
    """Prompts that are decoded side by side; the session's own state is another."""

    def prefill(self) -> Logits:
        """Logits (R, V) after each prompt."""

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row; logits (R, V)."""

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these, which keep their order."""


@runtime_checkable
class Batched(Session, Protocol):
    """A session that can decode several prompts side by side, with the user that is set."""

    def rows(self, prompts: Sequence[Sequence[int]]) -> Rows:
        """One row a prompt; prompts may differ in length."""


def generate_together(
    session: Session,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    stop: Collection[int] = (),
    on_answer: Callable[[], None] | None = None,
) -> list[Generated]:
    """An answer to every prompt, in order; the session's state is empty after it.

    Args:
        samplings: one for each prompt.
        on_answer: called after each answer, for a progress bar.

    Raises:
        UsageError: a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise UsageError("prompt", "is empty", "give at least one token")
    session.reset()
    if isinstance(session, Batched):
        return decode_rows(session.rows, prompts, samplings, stop=stop, on_answer=on_answer)
    found = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        found.append(generate(session, prompt, sampling=sampling, stop=stop))
        session.reset()
        if on_answer:
            on_answer()
    return found


def decode_rows(
    make_rows: Callable[[Sequence[Sequence[int]]], Rows],
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    stop: Collection[int] = (),
    on_answer: Callable[[], None] | None = None,
) -> list[Generated]:
    """As `generate_together`, with rows that `make_rows` makes of up to ROWS prompts."""
    found: dict[int, Generated] = {}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))  # little padding
    for start in range(0, len(order), ROWS):
        _decode(make_rows, prompts, samplings, order[start : start + ROWS], stop, found, on_answer)
    return [found[place] for place in range(len(prompts))]


def _decode(
    make_rows: Callable[[Sequence[Sequence[int]]], Rows],
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    places: Sequence[int],
    stop: Collection[int],
    found: dict[int, Generated],
    on_answer: Callable[[], None] | None,
) -> None:
    """Decode the prompts of `places` side by side until each has its answer in `found`."""
    start_s = time.perf_counter()
    rows = make_rows([prompts[place] for place in places])
    rngs = {place: np.random.default_rng(samplings[place].seed) for place in places}
    tokens: dict[int, list[int]] = {place: [] for place in places}
    active, logits = list(places), rows.prefill()
    first_s = 0.0
    while active:
        kept: list[int] = []
        for row, place in enumerate(active):
            said = tokens[place]
            token = draw(logits[row], [*prompts[place], *said], samplings[place], rngs[place])
            ended = token in stop
            if not ended:
                said.append(token)
            if not ended and len(said) < samplings[place].max_tokens:
                kept.append(row)
                continue
            now_s = time.perf_counter() - start_s
            found[place] = Generated(
                tuple(said), "stop" if ended else "length", token if ended else None, len(prompts[place]),
                first_s or now_s, now_s - (first_s or now_s),
            )  # fmt: skip
            if on_answer:
                on_answer()
        first_s = first_s or time.perf_counter() - start_s
        if len(kept) < len(active):
            active = [active[row] for row in kept]
            rows.keep(kept)
        if active:
            logits = rows.step([tokens[place][-1] for place in active])
