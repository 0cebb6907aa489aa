"""What planted users have a taste for: attributes of texts, freed of each other.

    scale = Whitening.of(texts)          # on a pool of answers
    z = scale.read(texts)                # (A, J): mean 0, covariance 1 over the pool

Longer answers have more of almost everything, and without the second step length would explain every taste. So the
attributes are whitened with the symmetric root (ZCA): each stays as near to its name as uncorrelated numbers can be.
Attributes that hardly vary in the pool are left out.

Shape legend: A answers, J attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgealign.errors import InputError, UsageError
from edgealign.personalize.attributes import ATTRIBUTES, words
from edgealign.registry import suggest

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")
# fmt: off
CHEERFUL = frozenset((
    "good", "great", "glad", "happy", "love", "lovely", "nice", "wonderful", "fun", "joy", "yay", "hooray", "best",
    "delighted", "amazing", "beautiful", "sweet", "kind", "wow", "super", "bright",
))
HEDGES = frozenset((
    "maybe", "perhaps", "might", "could", "may", "seems", "probably", "possibly", "think", "guess", "about", "some",
    "usually", "often", "sometimes",
))
YOU, ME = frozenset(("you", "your", "yours", "yourself")), frozenset(("i", "me", "my", "mine", "we", "us", "our"))
# fmt: on
WAYS = {
    "length": ("longer", "shorter"), "formality": ("more formal", "more casual"), "word length": ("longer words",
    "shorter words"), "sentence length": ("longer sentences", "shorter sentences"), "bullets": ("bullets", "prose"),
    "you": ("speaks to you", "speaks less to you"), "me": ("speaks of itself", "speaks less of itself"),
    "exclamations": ("more exclamation marks", "fewer exclamation marks"), "questions": ("more questions",
    "fewer questions"), "digits": ("more digits", "fewer digits"),
}  # fmt: skip
LEAST_DEVIATION = 1e-3
LEAST_VARYING = 0.05  # share of the pool that must differ from its most frequent value


def _share(known: frozenset[str]) -> Callable[[str], float]:
    """Of the words, how many are among `known`; of few words, not all: one "great" is no style."""
    return lambda text: sum(word in known for word in words(text)) / (len(words(text)) + 5)


def word_length(text: str) -> float:
    """Mean letters of a word."""
    found = words(text)
    return sum(map(len, found)) / len(found) if found else 0.0


def sentence_length(text: str) -> float:
    """ln(1 + words per sentence)."""
    return float(np.log1p(len(words(text)) / max(1, len(SENTENCE_END.findall(text)))))


def _count(mark: str) -> Callable[[str], float]:
    return lambda text: float(np.log1p(text.count(mark)))


TRAITS: dict[str, Callable[[str], float]] = {
    **ATTRIBUTES,
    "exclamations": _count("!"),
    "questions": _count("?"),
    "word length": word_length,
    "sentence length": sentence_length,
    "cheer": _share(CHEERFUL),
    "hedging": _share(HEDGES),
    "you": _share(YOU),
    "me": _share(ME),
    "digits": lambda text: float(np.log1p(sum(letter.isdigit() for letter in text))),
}


def in_words(trait: str, more: bool) -> str:
    """How a person says that they want more or less of an attribute."""
    return WAYS.get(trait, (f"more {trait}", f"less {trait}"))[0 if more else 1]


def known_traits(names: Sequence[str]) -> tuple[str, ...]:
    """These attributes; none: all.

    Raises:
        UsageError: one that is not known.
    """
    for name in names:
        if name not in TRAITS:
            raise UsageError(name, f"is no attribute{suggest(name, TRAITS)}", f"choose from: {', '.join(TRAITS)}")
    return tuple(names or TRAITS)


@dataclass(frozen=True)
class Whitening:
    """`names` (J,) of the attributes that vary; `mean` (J,) and `root` (J, J) of the pool."""

    names: tuple[str, ...]
    mean: Floats
    root: Floats

    @classmethod
    def of(cls, texts: Sequence[str], among: Sequence[str] = ()) -> Whitening:
        """Learn it from a pool of answers.

        Args:
            among: attributes to choose from; none: all.

        Raises:
            InputError: no attribute varies in the pool.
            UsageError: one that is not known.
        """
        values = {name: np.array([TRAITS[name](text) for text in texts]) for name in known_traits(among)}
        names = tuple(name for name, found in values.items() if _varies(found))
        if len(texts) < 2 or not names:
            raise InputError(f"{len(texts)} answers", "are too much alike to have a taste for", "give more answers")
        raw = np.stack([values[name] for name in names], axis=1)
        deviation = raw.std(0)
        sizes, axes = np.linalg.eigh(np.corrcoef(raw, rowvar=False).reshape(len(names), len(names)))
        turn = axes @ np.diag(sizes.clip(min=LEAST_DEVIATION) ** -0.5) @ axes.T
        return cls(names, raw.mean(0), turn / deviation[:, None])

    def read(self, texts: Sequence[str]) -> Floats:
        """(A, J)."""
        raw = np.array([[TRAITS[name](text) for name in self.names] for text in texts])
        found: Floats = (raw.reshape(len(texts), len(self.names)) - self.mean) @ self.root
        return found


def _varies(values: Floats) -> bool:
    _, counts = np.unique(values, return_counts=True)
    return bool(values.std() > LEAST_DEVIATION and 1 - counts.max() / len(values) >= LEAST_VARYING)
