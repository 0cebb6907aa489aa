"""How far two sets of logits are apart, in numbers that also mean something for a model with flat logits.

A model with random weights spreads its probability over the whole vocabulary: any two of its distributions have a small
KL divergence, and its likeliest token is decided by noise. So three numbers stand together. The KL divergence weighs
what a sampler would do. The correlation of the logits is free of scale. Agreement on the likeliest token counts only
where the reference is decided: where it gives one token more than half of the probability, and the lead over the
runner-up exceeds the noise that the recipe admits. That noise is fixed beforehand, not taken from what is observed, so
that a bad export cannot excuse its own errors; where fewer than ``LEAST_DECIDED`` positions are decided, agreement is
not judged at all, and the report says so.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Logits

    Rows: TypeAlias = npt.NDArray[np.float64]

# A lead of this many standard deviations of (noise of the first - noise of the second) is decided: 2.3 % chance errors.
DECIDED_SIGMAS = 2.0
LEAST_DECIDED = 20
LEAST_PROBABILITY = 0.5  # a barely trained model leans on the same few frequent tokens everywhere, and is sure of none


@dataclass(frozen=True)
class Distance:
    """Means over T positions; `top1` is over the `decided` ones, None where they are too few."""

    positions: int
    decided: int
    kl: float
    correlation: float
    top1: float | None
    entropy: float
    largest: float


def measure(pairs: Iterable[tuple[Logits, Logits]], *, admitted_noise: float) -> Distance:
    """Distance over windows of (reference, candidate) logits, each (T, V); one window is held at a time."""
    positions = agreeing = decided_count = 0
    kl_sum = correlation_sum = entropy_sum = largest = 0.0
    for reference, candidate in pairs:
        positions += len(reference)
        log_p, log_q = log_softmax(reference), log_softmax(candidate)
        p = np.exp(log_p)
        kl_sum += float((p * (log_p - log_q)).sum())
        entropy_sum -= float((p * log_p).sum())
        correlation_sum += float(correlation(reference, candidate).sum())
        largest = max(largest, float(np.abs(reference - candidate).max()))
        clear = decided(reference, admitted_noise)
        decided_count += int(clear.sum())
        agreeing += int((reference.argmax(-1) == candidate.argmax(-1))[clear].sum())
    assert positions, "nothing to measure"
    top1 = agreeing / decided_count if decided_count >= LEAST_DECIDED else None
    kl, alike, entropy = (total / positions for total in (kl_sum, correlation_sum, entropy_sum))
    return Distance(positions, decided_count, kl, alike, top1, entropy, largest)


def decided(reference: Logits, admitted_noise: float) -> npt.NDArray[np.bool_]:
    """Where the likeliest token (T,) has most of the probability and leads by more than the noise.

    The noise is in standard deviations of the logits; a difference of two logits has that of one times sqrt(2).
    """
    top = np.partition(reference, -2, axis=-1)[:, -2:]
    least = DECIDED_SIGMAS * np.sqrt(2) * admitted_noise * reference.std(axis=-1)
    sure = log_softmax(reference).max(axis=-1) > np.log(LEAST_PROBABILITY)
    clear: npt.NDArray[np.bool_] = sure & ((top[:, 1] - top[:, 0]) > least)
    return clear


def correlation(a: Logits, b: Logits) -> Rows:
    """Pearson correlation over the vocabulary (T,); 0 where one side is constant."""
    a64 = a.astype(np.float64)
    b64 = b.astype(np.float64)
    a64 -= a64.mean(axis=-1, keepdims=True)
    b64 -= b64.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a64 * a64).sum(-1) * (b64 * b64).sum(-1))
    found: Rows = np.divide((a64 * b64).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)
    return found


def strength(a: Logits, b: Logits) -> float:
    """How much larger the change b (T, V) is than the change a, as a ratio of norms; 0 where b is nothing."""
    size = float(np.linalg.norm(a))
    return float(np.linalg.norm(b)) / size if size > 0 else 0.0


def log_softmax(logits: Logits) -> Rows:
    """Log-probabilities (T, V) in 64 bits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
