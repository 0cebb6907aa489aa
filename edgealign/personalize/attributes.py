"""Attributes of an answer, as pure functions of its text: what a planted taste is made of.

Each returns one number; larger means more of what its name says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)?")
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+", re.MULTILINE)
# fmt: off
CASUAL_WORDS = frozenset((
    "hey", "sure", "ok", "okay", "yeah", "yep", "wanna", "gonna", "gotta", "buddy", "cool", "fun", "stuff", "easy",
    "guys", "kinda",
))
FORMAL_WORDS = frozenset((
    "certainly", "kindly", "therefore", "advisable", "recommend", "sufficient", "service", "assistance", "proceed",
    "following", "trust", "remain", "one", "should", "would", "please", "thank", "moreover", "however", "regarding",
))
# fmt: on


def words(text: str) -> list[str]:
    """The words of a text, lower case, contractions whole."""
    return [match.group().lower() for match in WORD.finditer(text)]


def log_words(text: str) -> float:
    """ln(1 + number of words)."""
    return math.log1p(len(words(text)))


def bullet_share(text: str) -> float:
    """Share of the non-empty lines that are list items, 0 to 1."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(BULLET.findall(text)) / len(lines) if lines else 0.0


def formality(text: str) -> float:
    """(formal markers - casual markers) per word; contractions and exclamation marks are casual."""
    found = words(text)
    if not found:
        return 0.0
    formal = sum(word in FORMAL_WORDS for word in found)
    casual = sum(word in CASUAL_WORDS or "'" in word or "\u2019" in word for word in found) + text.count("!")
    return (formal - casual) / len(found)


ATTRIBUTES: dict[str, Callable[[str], float]] = {
    "length": log_words,
    "bullets": bullet_share,
    "formality": formality,
}


def measure(text: str) -> dict[str, float]:
    """All attributes of a text."""
    return {name: attribute(text) for name, attribute in ATTRIBUTES.items()}


def standardize(pool: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each attribute over a pool of answers (the scale of a taste)."""
    scale = {}
    for name, attribute in ATTRIBUTES.items():
        values = [attribute(text) for text in pool]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        scale[name] = (mean, math.sqrt(variance) or 1.0)
    return scale


def reward(text: str, taste: Mapping[str, float], scale: Mapping[str, tuple[float, float]]) -> float:
    """How much a user with this taste likes the text: taste . z(text) / |taste|, in standard deviations."""
    size = math.sqrt(sum(weight**2 for weight in taste.values()))
    total = sum(weight * (ATTRIBUTES[name](text) - scale[name][0]) / scale[name][1] for name, weight in taste.items())
    return total / size
