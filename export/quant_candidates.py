"""What `--quant auto` tries: the first mixtures, the repairs of those that lose too much, and what is left in the race.

Pure functions of what was measured; `quant_search` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgealign.bench.compare import describe
from edgealign.parity import quant_bits
from edgealign.parity_recipes import VerifyRecipe
from edgealign.tensor_types import GROUPS, SEARCHED, Mixture

# A base that loses too much with every head has its groups raised to this.
RAISED: Mapping[str, str] = {"q4_0": "q8_0", "q4_k_s": "q6_k"}
MOST_RAISED = 3  # all four groups would be another base
NEIGHBOURS = 2  # over the budget, timed once to show what the budget costs
LEAST_LEFT = 3


@dataclass
class Trial:
    """One mixture and what is known of it. Speeds are samples in tokens per second; `error` is why it was skipped."""

    mixture: Mixture
    error: str | None = None
    types: dict[str, dict[str, int]] = field(default_factory=dict)
    file_bytes: int = 0
    token_bytes: int = 0
    kl: float | None = None
    correlation: float | None = None
    top1: float | None = None
    feeding: float | None = None  # largest gap between one pass and single tokens, in deviations of the logits
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    predicted: float | None = None  # decode, where nothing was timed

    @property
    def label(self) -> str:
        return self.mixture.label

    @property
    def measured(self) -> bool:
        return self.error is None and self.kl is not None

    def speed(self, which: str = "decode") -> dict[str, Any]:
        """Median and interval of `decode` or `prefill`; a prediction has neither interval nor samples."""
        samples: list[float] = getattr(self, which)
        if samples:
            return describe(samples)
        return {"n": 0, "median": self.predicted if which == "decode" else None, "low": None, "high": None}


def first_mixtures() -> list[Mixture]:
    """Every base with every head, in the order in which they are tried."""
    return [Mixture(base, head) for base, heads in SEARCHED.items() for head in heads]


def single_repairs(trials: Sequence[Trial], gate: VerifyRecipe, kl_budget: float) -> list[tuple[Trial, list[Mixture]]]:
    """Bases that are over the limit with every head, by their best head, and each of their groups raised alone."""
    found = []
    for base, kind in RAISED.items():
        own = [trial for trial in trials if trial.mixture.base == base and trial.measured and not trial.mixture.groups]
        if not own or any(excess(trial, gate, kl_budget) is None for trial in own):
            continue
        best = min(own, key=lambda trial: (trial.kl, trial.label))
        groups = [group for group in GROUPS if group in best.types]
        found.append((best, [Mixture(base, best.mixture.head, (f"{group}={kind}",)) for group in groups]))
    return found


def joint_repairs(start: Trial, singles: Sequence[Trial]) -> Iterator[Mixture]:
    """Two groups raised, then three: first those that win most KL for each byte that a token reads more."""

    def gain(trial: Trial) -> float:
        more = max(trial.token_bytes - start.token_bytes, 1)
        return ((start.kl or 0.0) - (trial.kl or 0.0)) / more

    useful = sorted((trial for trial in singles if trial.measured), key=lambda trial: (-gain(trial), trial.label))
    entries = [trial.mixture.groups[0] for trial in useful]
    for count in range(2, min(MOST_RAISED, len(entries)) + 1):
        chosen = set(entries[:count])
        ordered = tuple(entry for group in GROUPS for entry in chosen if entry.startswith(f"{group}="))
        yield Mixture(start.mixture.base, start.mixture.head, ordered)


def excess(trial: Trial, gate: VerifyRecipe, kl_budget: float) -> str | None:
    """Why a measured mixture may not be chosen: the budget, or a gate that would refuse it; None where it may."""
    bits = quant_bits(trial.label)
    kl, alike, least = (float(getattr(gate, f"{name}_{bits}bit")) for name in ("kl", "corr", "top1"))
    if trial.kl is None or not math.isfinite(trial.kl):
        return "its logits are not all numbers"
    if trial.kl > kl_budget:
        return "over the budget"
    if trial.kl > kl:
        return f"over the parity gate (kl_{bits}bit = {kl:g})"
    if trial.correlation is not None and trial.correlation < alike:
        return f"under the parity gate (corr_{bits}bit = {alike:g})"
    if trial.top1 is not None and trial.top1 < least:
        return f"under the parity gate (top1_{bits}bit = {least:g})"
    if trial.feeding is not None and trial.feeding > gate.state_tolerance:
        return f"over the parity gate (state_tolerance = {gate.state_tolerance:g}, a prompt against its single tokens)"
    return None


def neighbours(trials: Sequence[Trial], gate: VerifyRecipe, kl_budget: float) -> list[Trial]:
    """The mixtures just over the limit."""
    over = [trial for trial in trials if trial.measured and excess(trial, gate, kl_budget) is not None]
    return sorted(over, key=lambda trial: (trial.kl, trial.label))[:NEIGHBOURS]


def keep_faster(field: Sequence[Trial]) -> list[Trial]:
    """The faster half of those that were timed, at least `LEAST_LEFT`, in their old order."""
    ranked = sorted(field, key=lambda trial: (-trial.speed()["median"], trial.label))
    left = ranked[: max(LEAST_LEFT, -(-len(ranked) // 2))]
    return [trial for trial in field if trial in left]


def choose(field: Sequence[Trial]) -> tuple[Trial, str]:
    """The fastest decode; where intervals overlap the faster prefill; where those overlap too the lower KL. And why."""
    best = max(field, key=lambda trial: (trial.speed()["median"], -(trial.kl or 0.0)))
    ties = [trial for trial in field if _ties(trial, best, "decode")]
    if len(ties) == 1:
        return best, "the fastest decode" + ("" if best.decode else " that is predicted")
    quickest = max(ties, key=lambda trial: trial.speed("prefill")["median"] or 0.0)
    level = [trial for trial in ties if _ties(trial, quickest, "prefill")]
    chosen = min(level, key=lambda trial: (trial.kl, trial.label))
    others = ", ".join(trial.label for trial in ties if trial is not chosen)
    if len(level) == 1:
        return chosen, f"no difference in decode is shown to {others} (intervals overlap), and prefill is the fastest"
    return chosen, f"no difference in speed is shown to {others} (intervals overlap), and the KL is the lowest"


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other one beats in both decode speed and KL, from slow to fast."""
    known = [trial for trial in trials if trial.measured and trial.speed()["median"]]
    ranked = sorted(known, key=lambda trial: (-trial.speed()["median"], trial.kl))
    found: list[Trial] = []
    for trial in ranked:
        if not found or (trial.kl or 0.0) < (found[-1].kl or 0.0):
            found.append(trial)
    return found[::-1]


def _ties(one: Trial, best: Trial, which: str) -> bool:
    mine, its = one.speed(which), best.speed(which)
    if one is best:
        return True
    if mine["high"] is None or its["low"] is None:
        return bool(mine["median"] == its["median"])
    return bool(mine["high"] >= its["low"])
