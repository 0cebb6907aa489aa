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
from edgealign.runtimes.control_vector import find_control_vector
from edgealign.runtimes.process import ProcessSession
from edgealign.runtimes.session import TARGET_RUNTIMES, Bundle
from edgealign.runtimes.torch_session import TorchSession

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

CALL_TIMEOUT_S = 600.0
# Programs without an exact mode: their activations have 8 bits however they are opened.
ROUNDED_ACTIVATIONS = ("8da4w",)
LARGE_LOGIT = 4.0  # the gate for 16-bit caches was measured on logits up to about this


@dataclass(frozen=True)
class Subject:
    """What one verification works on."""

    bundle: Bundle
    bits: int
    oracle: TorchSession
    adapters: Mapping[str, Path]  # directories, for the oracle; the bundle has its own files
    recipe: VerifyRecipe

    @property
    def first_lora(self) -> str | None:
        """The first user whose adapter can be added into the weights: a direction in the states cannot."""
        return next((user for user, path in self.adapters.items() if find_control_vector(path) is None), None)

    def open(self, *, exact: bool) -> ProcessSession:
        return open_bundle(self.bundle, self.recipe, exact=exact)

    def switch_oracle(self, user: str | None) -> None:
        self.oracle.set_user(None if user is None else self.adapters[user])

    def switch(self, session: ProcessSession, user: str | None) -> None:
        session.set_user(None if user is None else self.bundle.adapters[user])


def open_bundle(bundle: Bundle, recipe: VerifyRecipe, *, exact: bool) -> ProcessSession:
    """The bundle in its own runtime, in a process of its own."""
    context = max(*recipe.prompt_lengths, recipe.window_tokens) + recipe.steps + 1
    return ProcessSession(
        bundle.model_file, runtime=TARGET_RUNTIMES[bundle.target], exact=exact, threads=recipe.threads or None,
        context=max(context, 256), timeout_s=CALL_TIMEOUT_S,
    )  # fmt: skip


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
    exact = subject.bits == 32
    rows = subject.oracle.score(tokens) if exact else session.score(tokens)
    tolerance = subject.recipe.exact_tolerance if exact else _state_tolerance(subject, rows)
    against = "against torch" if exact else "against one pass of the bundle itself"

    session.reset()
    short = tokens[:24]
    singles = np.stack([session.step(token) for token in short]) - rows[: len(short)]
    checks = [largest("feed.one_by_one", singles, tolerance, f"{len(short)} single tokens; {against}")]

    gaps = [np.zeros(1, dtype=np.float32)]
    cuts = _cuts(len(tokens))
    for cut in cuts:
        session.reset()
        start = 0
        for length in cut:
            gaps.append(session.prefill(tokens[start : start + length]) - rows[start + length - 1])
            start += length
    checks.append(largest("feed.split", np.concatenate(gaps), tolerance, f"{len(cuts)} splits of a prompt; {against}"))

    session.reset()
    session.prefill(prompts[0])
    session.reset()
    note = f"the same {len(tokens)} tokens again after another conversation"
    checks.append(_identical("state.second_conversation", session.prefill(tokens), fresh["base"], note))
    if not exact:
        session.reset()
        ends = [session.prefill(tokens[:-steps]), *(session.step(token) for token in tokens[-steps:])]
        gap = np.stack(ends) - rows[-steps - 1 :]
        checks.append(largest("feed.steps", gap, tolerance, f"{steps} tokens after a prompt; {against}"))
    return checks


def check_user(
    subject: Subject,
    session: ProcessSession,
    user: str | None,
    prompts: list[list[int]],
    rows: dict[str | None, Logits],
) -> list[Check]:
    """32 bit: all prompts and steps against torch. Any file: an adapter must do something. Fills `rows`."""
    name, steps, exact = user or "base", subject.recipe.steps, subject.bits == 32
    subject.switch(session, user)
    subject.switch_oracle(user)
    gaps: list[Logits] = []
    for prompt in prompts if exact else prompts[-1:]:
        session.reset()
        got = np.stack([session.prefill(prompt[:-steps]), *(session.step(token) for token in prompt[-steps:])])
        if exact:
            expected = subject.oracle.score(prompt)[-steps - 1 :]
            gaps.append(got - expected)
    rows[user] = got
    checks = []
    if exact:
        lengths = ", ".join(str(len(prompt) - steps) for prompt in prompts)
        note = f"against torch, prompts of {lengths} tokens and {steps} steps"
        checks.append(largest(f"logits.{name}", np.concatenate(gaps), subject.recipe.exact_tolerance, note))
    if user is not None:
        moved = float(np.abs(got - rows[None]).max())
        least = subject.recipe.adapter_factor * subject.recipe.exact_tolerance
        checks.append(_at_least(f"effect.{name}", moved, least, "the largest change of a logit by the adapter"))
    return checks


def check_swaps(
    subject: Subject, session: ProcessSession, prompt: list[int], fresh: dict[str, Logits]
) -> list[Check]:
    """A -> B -> A equals an A that nobody preceded, and the base is the base again, bit for bit."""
    if not subject.adapters:
        return []
    first, second = [*subject.adapters, None][:2]
    for user in (first, second, first):
        subject.switch(session, user)
        got = session.prefill(prompt)
    note = f"{first} -> {second or 'base'} -> {first} against a fresh process"
    checks = [_identical("state.swap", got, fresh["user"], note)]
    subject.switch(session, None)
    note = "the base after all adapters against the base before them"
    return [*checks, _identical("state.base_after_users", session.prefill(prompt), fresh["base"], note)]


def check_default_mode(subject: Subject, session: ProcessSession, prompt: list[int]) -> list[Check]:
    """A 32-bit file as it ships: the runtime's own cache has 16 bits."""
    steps = subject.recipe.steps
    subject.switch_oracle(None)
    expected = subject.oracle.score(prompt)
    got = np.stack([session.prefill(prompt[:-steps]), *(session.step(token) for token in prompt[-steps:])])
    # 16-bit rounding is relative: a trained model's large logits carry a larger error than a random model's.
    tolerance = subject.recipe.default_tolerance * max(1.0, float(np.abs(expected).max()) / LARGE_LOGIT)
    note = "the runtime's own settings (16-bit cache) against torch"
    return [largest("logits.default_mode", got - expected[-len(got) :], tolerance, note)]


def check_merged(subject: Subject, user: str, prompt: list[int], shipped: Logits) -> list[Check]:
    """The adapter beside the weights in the bundle, and added into them in torch: for good, nothing can follow."""
    subject.switch_oracle(user)
    subject.oracle.merge_user()
    expected = subject.oracle.score(prompt)[-len(shipped) :]
    tolerance = subject.recipe.exact_tolerance
    return [largest(f"merged.{user}", shipped - expected, tolerance, "against torch with the adapter merged")]


def check_distribution(subject: Subject, session: ProcessSession, model: str | Path) -> list[Check]:
    """A quantised bundle as it ships, teacher-forced over text; one window of logits (T, V) is held at a time."""
    kl, top1, least = (_gate(subject, name) for name in ("kl", "top1", "corr"))
    windows = text_windows(model, count=subject.recipe.windows, length=subject.recipe.window_tokens)
    subject.switch_oracle(None)
    pairs = ((subject.oracle.score(window), session.score(window)) for window in windows)
    found = measure(pairs, admitted_noise=_gate(subject, "noise"))
    over = f"mean over {found.positions} tokens of text"
    flat = f"torch's entropy {found.entropy:.2f} of {np.log(subject.oracle.vocab):.2f} nat"
    sure = f"{found.decided} positions where torch's lead exceeds the admitted noise"
    checks = [
        _at_least("quant.correlation", found.correlation, least, f"of the logits, {over}"),
        _at_most("quant.kl", found.kl, kl, f"nat, {over}; {flat}"),
    ]
    if found.top1 is None:
        checks.append(Check("quant.top1", None, top1, True, f"not judged: only {sure}"))
    else:
        checks.append(_at_least("quant.top1", found.top1, top1, f"same likeliest token at {sure}"))
    window = windows[0]
    base, base_shipped = subject.oracle.score(window), session.score(window)
    for user in subject.adapters:
        subject.switch_oracle(user)
        subject.switch(session, user)
        checks += _check_survival(
            subject, user, subject.oracle.score(window) - base, session.score(window) - base_shipped
        )
    return checks


def check_same_weights(
    subject: Subject, session: ProcessSession, model: str | Path, prompt: list[int]
) -> list[Check]:
    """The file's tensors against the model's, then the runtime against torch with those tensors, for good."""
    checks, left = check_weights(
        subject.bundle.model_file, model, _gate(subject, "rounding"), subject.oracle.weights()
    )
    least = subject.recipe.same_weights
    for user in (None, *subject.adapters):
        name = "same_weights." + (user or "base")
        if left:
            note = f"not judged: torch keeps {left} of these weights in another layout"
            checks.append(Check(name, None, least, True, note))
            continue
        subject.switch_oracle(user)
        subject.switch(session, user)
        alike = float(correlation(subject.oracle.score(prompt), session.score(prompt)).mean())
        checks.append(_at_least(name, alike, least, "correlation of the logits, torch with the same rounded weights"))
    return checks


def largest(name: str, gap: Logits, tolerance: float, note: str) -> Check:
    """The check that the largest absolute difference is within the tolerance."""
    return _at_most(name, float(np.abs(gap).max()), tolerance, note)


def _check_survival(subject: Subject, user: str, change: Logits, shipped: Logits) -> list[Check]:
    """What an adapter changes (T, V): in the same direction as in torch, and about as much."""
    ratio, most = strength(change, shipped), subject.recipe.strength_ratio
    note = f"size of the adapter's change against torch, {1 / most:.2f} to {most:.2f}"
    within = 1 / most <= ratio <= most
    alive = float(correlation(change, shipped).mean())
    kept = "correlation of the adapter's change with torch"
    return [
        _at_least(f"survival.{user}", alive, _gate(subject, "survival"), kept),
        Check(f"strength.{user}", ratio if np.isfinite(ratio) else None, most, within, note),
    ]


def _gate(subject: Subject, name: str) -> float:
    return float(getattr(subject.recipe, f"{name}_{subject.bits}bit"))


def _cuts(length: int) -> list[list[int]]:
    """Ways to cut a prompt: pieces below, at and above the convolution's width, early and late."""
    half = length // 2
    wanted = [[1], [2], [3], [4], [1, 1], [2, 1, 1], [half], [half, 1], [half, 2], [half, 1, 1, 1]]
    return [[*head, length - sum(head)] for head in wanted if 0 < sum(head) < length]


def _state_tolerance(subject: Subject, rows: Logits) -> float:
    rounded = subject.bundle.quant in ROUNDED_ACTIVATIONS
    part = subject.recipe.rounded_state_tolerance if rounded else subject.recipe.state_tolerance
    return part * float(rows.std())


def _identical(name: str, got: Logits, wanted: Logits, note: str) -> Check:
    same = bool(np.array_equal(got, wanted))
    gap = float(np.abs(got - wanted).max())
    return Check(name, gap if np.isfinite(gap) else None, 0.0, same, f"{note}, bit for bit")


def _at_most(name: str, value: float, tolerance: float, note: str) -> Check:
    # What is not a number must fail, and a manifest holds finite numbers only.
    if not np.isfinite(value):
        return Check(name, None, tolerance, False, f"the logits are not all numbers; {note}")
    return Check(name, value, tolerance, value <= tolerance, f"{note}; at most")


def _at_least(name: str, value: float, tolerance: float, note: str) -> Check:
    if not np.isfinite(value):
        return Check(name, None, tolerance, False, f"the logits are not all numbers; {note}")
    return Check(name, value, tolerance, value >= tolerance, f"{note}; at least")
