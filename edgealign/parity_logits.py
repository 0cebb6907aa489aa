"""The logit checks of the parity gate: how tokens are fed, what users do, what quantising costs.

The graph and its state are checked in the runtime's exact mode. A file of 32-bit weights must give torch's numbers; a
quantised one its own numbers whichever way it is fed, torch's distribution in the mode that ships (`parity_metrics`),
and the numbers of torch with the same rounded weights (`parity_weights`).

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgealign.artifact import Check
from edgealign.parity_metrics import correlation, measure, strength
from edgealign.parity_recipes import VerifyRecipe
from edgealign.parity_text import text_windows
from edgealign.parity_weights import check_weights
from edgealign.runtimes.process import ProcessSession
from edgealign.runtimes.session import TARGET_RUNTIMES, Bundle
from edgealign.runtimes.torch_session import TorchSession

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

CALL_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Subject:
    """What one verification works on."""

    bundle: Bundle
    bits: int
    oracle: TorchSession
    adapters: Mapping[str, Path]  # in PEFT layout, for the oracle; the bundle has its own files
    recipe: VerifyRecipe

    def open(self, *, exact: bool) -> ProcessSession:
        context = max(*self.recipe.prompt_lengths, self.recipe.window_tokens) + self.recipe.steps + 1
        runtime = TARGET_RUNTIMES[self.bundle.target]
        return ProcessSession(
            self.bundle.model_file, runtime=runtime, exact=exact, threads=self.recipe.threads or None,
            context=max(context, 256), timeout_s=CALL_TIMEOUT_S,
        )  # fmt: skip

    def switch_oracle(self, user: str | None) -> None:
        self.oracle.set_user(None if user is None else self.adapters[user])

    def switch(self, session: ProcessSession, user: str | None) -> None:
        session.set_user(None if user is None else self.bundle.adapters[user])


def prompts(subject: Subject) -> list[list[int]]:
    """Seeded random prompts in growing length, each with room for the steps that follow it."""
    rng = np.random.default_rng(subject.recipe.seed)
    vocab = subject.oracle.vocab
    lengths = sorted(subject.recipe.prompt_lengths)
    return [[int(token) for token in rng.integers(0, vocab, length + subject.recipe.steps)] for length in lengths]


def remember_fresh(subject: Subject, user: str, prompt: list[int], fresh: dict[str, Logits]) -> list[Check]:
    """What a process that has never seen anybody else says for this user."""
    with closing(subject.open(exact=True)) as session:
        subject.switch(session, user)
        fresh["user"] = session.prefill(prompt)
    return []


def check_feeding(
    subject: Subject, session: ProcessSession, prompts: list[list[int]], fresh: dict[str, Logits]
) -> list[Check]:
    """However the tokens arrive, the logits are the same: torch's for 32 bit, the bundle's own otherwise."""
    tokens, steps = prompts[-1], subject.recipe.steps
    fresh["base"] = session.prefill(tokens)
    subject.switch_oracle(None)
    rows = subject.oracle.score(tokens) if subject.bits == 32 else session.score(tokens)
    tolerance, note = _feeding_tolerance(subject, rows)

    session.reset()
    short = tokens[: min(24, len(tokens))]
    singles = np.stack([session.step(token) for token in short])
    checks = [largest("feed.one_by_one", singles - rows[: len(short)], tolerance, f"{len(short)} single tokens; {note}")]

    worst = [np.zeros(1, dtype=np.float32)]
    cuts = [cut for cut in _cuts(len(tokens)) if len(cut) > 1]
    for cut in cuts:
        session.reset()
        start = 0
        for length in cut:
            worst.append(session.prefill(tokens[start : start + length]) - rows[start + length - 1])
            start += length
    checks.append(largest("feed.split", np.concatenate(worst), tolerance, f"{len(cuts)} ways to split a prompt; {note}"))

    session.reset()
    session.prefill(prompts[0])
    session.reset()
    again = session.prefill(tokens)
    same = np.array_equal(again, fresh["base"])
    checks.append(
        Check("state.second_conversation", float(np.abs(again - fresh["base"]).max()), 0.0, bool(same),
              f"the same {len(tokens)} tokens after a reset, bit for bit")
    )  # fmt: skip
    if subject.bits != 32:
        session.reset()
        ends = [session.prefill(tokens[:-steps]), *(session.step(token) for token in tokens[-steps:])]
        gap = np.stack(ends) - rows[-steps - 1 :]
        checks.append(largest("feed.steps", gap, tolerance, f"{steps} tokens after a prompt; {note}"))
    return checks


def _cuts(length: int) -> list[list[int]]:
    """Ways to cut a prompt: pieces below, at and above the convolution's width, early and late."""
    half = length // 2
    wanted = [[1], [2], [3], [4], [1, 1], [2, 1, 1], [half], [half, 1], [half, 2], [half, 1, 1, 1]]
    return [[*head, length - sum(head)] for head in wanted if 0 < sum(head) < length]


def _feeding_tolerance(subject: Subject, rows: Logits) -> tuple[float, str]:
    if subject.bits == 32:
        return subject.recipe.exact_tolerance * _scale(rows), "against torch"
    return subject.recipe.state_tolerance * float(rows.std()), "against one pass of the bundle itself"


def _scale(rows: Logits) -> float:
    """32-bit rounding grows with the numbers: tolerances are for logits with a standard deviation of up to 1."""
    return max(1.0, float(rows.std()))


def check_user(
    subject: Subject, session: ProcessSession, user: str | None, prompts: list[list[int]], rows: dict[str | None, Logits]
) -> list[Check]:
    """32 bit: all prompts and steps against torch. Any: an adapter must do something, in torch and in the bundle."""
    name, steps = user or "base", subject.recipe.steps
    subject.switch(session, user)
    subject.switch_oracle(user)
    gaps: list[Logits] = []
    scale = 1.0
    for prompt in prompts if subject.bits == 32 else prompts[-1:]:
        session.reset()
        got = np.stack([session.prefill(prompt[:-steps]), *(session.step(token) for token in prompt[-steps:])])
        if subject.bits == 32:
            expected = subject.oracle.score(prompt)[-steps - 1 :]
            gaps.append(got - expected)
            scale = _scale(expected)
    rows[user] = got
    checks = []
    if subject.bits == 32:
        lengths = ", ".join(str(len(prompt) - steps) for prompt in prompts)
        note = f"against torch, prompts of {lengths} tokens and {steps} steps"
        tolerance = subject.recipe.exact_tolerance * scale
        checks.append(largest(f"logits.{name}", np.concatenate(gaps), tolerance, note))
    if user is not None:
        moved = float(np.abs(got - rows[None]).max())
        least = subject.recipe.adapter_factor * subject.recipe.exact_tolerance * scale
        checks.append(Check(f"effect.{name}", moved, least, moved >= least, "the adapter moves the logits by at least this"))
    return checks


def check_swaps(subject: Subject, session: ProcessSession, prompt: list[int], fresh: dict[str, Logits]) -> list[Check]:
    """A -> B -> A equals an A that nobody preceded, and the base is the base again, bit for bit."""
    checks = []
    users = list(subject.adapters)
    if users:
        other = users[1] if len(users) > 1 else None
        for user in (users[0], other, users[0]):
            subject.switch(session, user)
            got = session.prefill(prompt)
        gap = float(np.abs(got - fresh["user"]).max())
        note = f"{users[0]} -> {other or 'base'} -> {users[0]} against a fresh process, bit for bit"
        checks.append(Check("state.swap", gap, 0.0, bool(np.array_equal(got, fresh["user"])), note))
        subject.switch(session, None)
        got = session.prefill(prompt)
        gap = float(np.abs(got - fresh["base"]).max())
        note = "the base after all adapters against the base before them, bit for bit"
        checks.append(Check("state.base_after_users", gap, 0.0, bool(np.array_equal(got, fresh["base"])), note))
    return checks


def check_default_mode(subject: Subject, session: ProcessSession, prompt: list[int]) -> list[Check]:
    subject.switch_oracle(None)
    expected = subject.oracle.score(prompt)
    got = np.stack([session.prefill(prompt[: -subject.recipe.steps]), *map(session.step, prompt[-subject.recipe.steps :])])
    tolerance = subject.recipe.default_tolerance * _scale(expected)
    return [largest("logits.default_mode", got - expected[-len(got) :], tolerance, "the runtime's own F16 cache, against torch")]


def check_merged(subject: Subject, user: str, prompt: list[int], shipped: Logits) -> list[Check]:
    """The adapter beside the weights in the bundle, and added into them in torch. Nothing can follow: it is for good."""
    subject.switch_oracle(user)
    subject.oracle.merge_user()
    expected = subject.oracle.score(prompt)[-len(shipped) :]
    tolerance = subject.recipe.exact_tolerance * _scale(expected)
    return [largest(f"merged.{user}", shipped - expected, tolerance, "torch with the adapter merged into its weights")]


def check_distribution(subject: Subject, session: ProcessSession, model: str | Path) -> list[Check]:
    """A quantised bundle as it ships, teacher-forced over text; one window of logits (T, V) is held at a time."""
    recipe, bits = subject.recipe, subject.bits
    kl, top1, corr, survival = (
        float(getattr(recipe, f"{name}_{bits}bit")) for name in ("kl", "top1", "corr", "survival")
    )
    windows = text_windows(model, count=recipe.windows, length=recipe.window_tokens)
    subject.switch_oracle(None)
    pairs = ((subject.oracle.score(window), session.score(window)) for window in windows)
    found = measure(pairs, admitted_correlation=corr)
    over = f"over {found.positions} tokens of text"
    flat = f"entropy {found.entropy:.2f} of {np.log(subject.oracle.vocab):.2f} nat"
    sure = f"{found.decided} positions where torch's lead exceeds the admitted noise"
    checks = [
        Check("quant.correlation", found.correlation, corr, found.correlation >= corr, f"of the logits, mean {over}; at least"),
        Check("quant.kl", found.kl, kl, found.kl <= kl, f"nat, mean {over}; torch's {flat}; at most"),
        Check("quant.top1", found.top1, top1, found.top1 is None or found.top1 >= top1,
              f"same likeliest token at {sure}; at least" if found.top1 is not None else f"not judged: no {sure}"),
    ]  # fmt: skip
    window = windows[0]
    base, base_shipped = subject.oracle.score(window), session.score(window)
    for user in subject.adapters:
        subject.switch_oracle(user)
        subject.switch(session, user)
        change, change_shipped = subject.oracle.score(window) - base, session.score(window) - base_shipped
        alive = float(correlation(change, change_shipped).mean())
        ratio = strength(change, change_shipped)
        least = 1 / recipe.strength_ratio
        checks += [
            Check(f"survival.{user}", alive, survival, alive >= survival,
                  "correlation of what the adapter changes, in torch and in the bundle; at least"),
            Check(f"strength.{user}", ratio, recipe.strength_ratio, least <= ratio <= recipe.strength_ratio,
                  f"size of that change against torch, between {least:.2f} and {recipe.strength_ratio:.2f}"),
        ]  # fmt: skip
    return checks


def check_same_weights(subject: Subject, session: ProcessSession, model: str | Path, prompt: list[int]) -> list[Check]:
    """The file's tensors against the model's, then the runtime against torch with those tensors, for good."""
    recipe, tolerance = subject.recipe, float(getattr(subject.recipe, f"rounding_{subject.bits}bit"))
    put = subject.oracle.weights()
    checks, left = check_weights(subject.bundle.model_file, model, tolerance, put)
    for user in (None, *subject.adapters):
        name = "same_weights." + (user or "base")
        if left:
            note = f"not judged: torch keeps {left} of these weights in another layout"
            checks.append(Check(name, None, recipe.same_weights, True, note))
            continue
        subject.switch_oracle(user)
        subject.switch(session, user)
        alike = float(correlation(subject.oracle.score(prompt), session.score(prompt)).mean())
        note = "correlation of the logits with torch on the same rounded weights; at least"
        checks.append(Check(name, alike, recipe.same_weights, alike >= recipe.same_weights, note))
    return checks


def largest(name: str, gap: Logits, tolerance: float, note: str) -> Check:
    # A NaN is the largest difference there is: it must fail, and a manifest holds finite numbers only.
    value = float(np.abs(gap).max())
    finite = bool(np.isfinite(value))
    note = note if finite else f"the logits are not all numbers; {note}"
    return Check(name, value if finite else None, tolerance, finite and value <= tolerance, note)
