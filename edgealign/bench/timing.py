"""Samples and what is said about them: median, mean, sample standard deviation, 90th percentile, no trimming."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Of n samples; `sd` is with n - 1."""

    n: int
    median: float
    mean: float
    sd: float
    p90: float


def spread(samples: Sequence[float]) -> Spread:
    """Describe samples; one sample has no deviation (0)."""
    assert samples, "no samples"
    sd = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return Spread(len(samples), statistics.median(samples), statistics.fmean(samples), sd, percentile(samples, 0.9))


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks, as numpy does it."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def timed(action: Callable[..., T], *arguments: object) -> tuple[T, int]:
    """What one call returns, and its wall time in ns."""
    start = perf_counter_ns()
    value = action(*arguments)
    return value, perf_counter_ns() - start


def rates(samples_ns: Sequence[int], tokens: int) -> list[float]:
    """Tokens per second of each sample."""
    return [tokens * 1e9 / sample for sample in samples_ns]
