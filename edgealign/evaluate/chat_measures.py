"""What can be said about an answer by rule: on topic, in sentences, in known words, without loops.

No rule sees whether English is grammatical. Three proxies stand in, named as what they are: the share of an answer's
words that occur in the training text at all, the share of its neighbouring word pairs that do (against the same words
shuffled, which keeps the words and loses the order), and whether it looks like sentences from outside.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgealign.personalize.attributes import words

# fmt: off
FUNCTION_WORDS = frozenset((
    "a", "an", "the", "and", "or", "but", "so", "if", "because", "that", "this", "these", "those", "there", "here",
    "i", "you", "he", "she", "it", "we", "they", "me", "him", "her", "us", "them", "my", "your", "his", "its", "our",
    "their", "who", "what", "when", "where", "why", "how", "which", "is", "am", "are", "was", "were", "be", "been",
    "being", "do", "does", "did", "done", "have", "has", "had", "will", "would", "can", "could", "shall", "should",
    "may", "might", "must", "not", "no", "yes", "of", "in", "on", "at", "to", "from", "by", "with", "for", "about",
    "as", "into", "out", "up", "down", "off", "over", "under", "again", "then", "than", "too", "very", "all", "any",
    "some", "one", "only", "just", "also", "more", "most", "such", "own", "same", "other", "it's", "that's", "don't",
    "didn't", "wasn't", "i'm", "he's", "she's", "they're", "you're", "can't", "couldn't", "there's", "after", "before",
))
# fmt: on
LOOP = 4  # words; a run of this many that comes again is a repetition


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with a 95 % interval."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits, self.total)


def wilson(hits: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); nothing is known of nothing."""
    if not total:
        return 0.0, 1.0
    share = hits / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_mean(values: Sequence[float], *, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(array), (resamples, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def content_words(text: str) -> list[str]:
    """The words that carry a topic, without their commonest endings."""
    return [_stem(word) for word in words(text) if word not in FUNCTION_WORDS]


def on_topic(answer: str, about: str) -> float:
    """Share of the answer's content words that occur in the text it is about; 0 for an answer without any."""
    found = content_words(answer)
    known = set(content_words(about))
    return sum(word in known for word in found) / len(found) if found else 0.0


def has_keyword(answer: str, keywords: Iterable[str]) -> bool:
    return not set(words(answer)).isdisjoint(keywords)


def repeated(answer: str) -> float:
    """Share of the runs of four words that occurred in the answer before; 0 for fewer than five words."""
    found = words(answer)
    runs = [tuple(found[i : i + LOOP]) for i in range(len(found) - LOOP + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def looks_like_sentences(answer: str) -> bool:
    """Begins with a capital and ends with . ! or ?, quotation marks and brackets aside."""
    text = answer.strip().strip("\"'\u2018\u2019\u201c\u201d()-*\u2022 ")
    return text[:1].isupper() and text[-1:] in (".", "!", "?")


@dataclass(frozen=True)
class Vocabulary:
    """Which of the words and word pairs that were asked for occur in a text."""

    words: frozenset[str]
    pairs: frozenset[tuple[str, str]]

    @staticmethod
    def of(texts: Iterable[str], *, asked: Iterable[str]) -> Vocabulary:
        """One pass over `texts`, which may be large: only what occurs in `asked` is kept."""
        wanted_words: set[str] = set()
        wanted_pairs: set[tuple[str, str]] = set()
        for text in asked:
            found = words(text)
            wanted_words.update(found)
            wanted_pairs.update(pairwise(found))
            mixed = shuffled(found)
            wanted_pairs.update(pairwise(mixed))
        known_words: set[str] = set()
        known_pairs: set[tuple[str, str]] = set()
        for text in texts:
            found = words(text)
            known_words |= wanted_words.intersection(found)
            known_pairs |= wanted_pairs.intersection(pairwise(found))
        return Vocabulary(frozenset(known_words), frozenset(known_pairs))

    def word_share(self, texts: Sequence[str]) -> float:
        """Share of all words of the texts that are known."""
        found = [word for text in texts for word in words(text)]
        return sum(word in self.words for word in found) / len(found) if found else 0.0

    def pair_share(self, texts: Sequence[str], *, shuffle: bool = False) -> float:
        """Share of all neighbouring pairs of words that are known; `shuffle`: of the same words in a drawn order."""
        found = [pair for text in texts for pair in pairwise(shuffled(words(text)) if shuffle else words(text))]
        return sum(pair in self.pairs for pair in found) / len(found) if found else 0.0


def shuffled(items: Sequence[str]) -> list[str]:
    """The same items in an order that depends on them alone."""
    mixed = list(items)
    random.Random(" ".join(items)).shuffle(mixed)
    return mixed


def _stem(word: str) -> str:
    for ending in ("'s", "\u2019s", "ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
