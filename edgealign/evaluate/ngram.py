"""An n-gram model of token ids: interpolated modified Kneser-Ney, the baseline that a neural model has to beat.

    P_m(w | h) = max(c(h w) - D, 0) / c(h) + sum of D over the words seen after h / c(h) * P_{m-1}(w | h')

h' is h without its oldest token, P_0 is uniform. The highest order uses counts, the lower ones the number of
different tokens that precede an m-gram (Chen & Goodman 1998, section 3, equations 23 to 26). A document's first tokens
are predicted after repeated begin tokens. Every context gives a proper distribution over the whole vocabulary.

An m-gram is one number of 64 bits, so counting is sorting: 20 million tokens, with all 5-grams different, took 11 s on
one core and 2 GiB. Five tokens fit for vocabularies up to 4,096, four up to 65,536, three up to two million.

Shape legend: T predicted tokens, K different m-grams, H different contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgealign.errors import InputError

Keys: TypeAlias = npt.NDArray[np.uint64]
Floats: TypeAlias = npt.NDArray[np.float64]
Ids: TypeAlias = npt.NDArray[np.int32]

KEY_BITS = 64
# For data in which no m-gram occurs once, twice, three or four times; the numbers are KenLM's.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Level:
    """One order m: for each m-gram what is left of its count, for each context what goes to the order below."""

    grams: Keys  # (K,) sorted; the context is in the high bits
    mass: Floats  # (K,)
    contexts: Keys  # (H,) sorted
    backoff: Floats  # (H,)


@dataclass(frozen=True)
class Ngram:
    """`levels[m - 1]` is order m."""

    vocab: int
    levels: tuple[Level, ...]

    @property
    def order(self) -> int:
        return len(self.levels)


def longest_order(vocab: int) -> int:
    """How many tokens of this vocabulary fit one key."""
    return KEY_BITS // bits_of(vocab)


def bits_of(vocab: int) -> int:
    return max(1, (vocab - 1).bit_length())


def pack(documents: Sequence[Ids], *, vocab: int, order: int) -> Keys:
    """(T,) the key of every predicted token with the `order - 1` tokens before it.

    Each document starts with its begin token, which is given, not predicted, and repeated where there is nothing else
    before a token.

    Raises:
        InputError: `order` tokens do not fit one key, or a token is outside the vocabulary.
    """
    if order > longest_order(vocab):
        raise InputError(
            f"order {order}", f"does not fit a vocabulary of {vocab:,} tokens", f"use at most {longest_order(vocab)}"
        )
    if not documents:
        return np.empty(0, dtype=np.uint64)
    extra = max(0, order - 2)
    lengths = np.asarray([len(ids) for ids in documents])
    ends = np.cumsum(lengths + extra)
    stream = np.empty(int(ends[-1]), dtype=np.uint64)
    predicted = np.zeros(len(stream), dtype=bool)
    for ids, end in zip(documents, ends.tolist(), strict=True):
        start = end - len(ids)
        stream[start - extra : start] = ids[0]
        stream[start:end] = ids
        predicted[start + 1 : end] = True
    if int(stream.max()) >= vocab:
        raise InputError(f"token {int(stream.max())}", f"is outside the vocabulary of {vocab:,}", "use its tokenizer")
    (places,) = np.nonzero(predicted)
    keys = np.zeros(len(places), dtype=np.uint64)
    for back in range(order - 1, -1, -1):
        keys <<= np.uint64(bits_of(vocab))
        keys |= stream[places - back]
    return keys


def train(keys: Keys, *, vocab: int, order: int, discount: float | None = None) -> Ngram:
    """Count and smooth what `pack` made for the same `order`; `discount` is one D in the place of estimated ones.

    Raises:
        InputError: there is nothing to count.
    """
    if not len(keys):
        raise InputError("n-gram baseline", "has no text to count", "give more --data")
    bits = bits_of(vocab)
    levels = []
    grams, counts = np.unique(keys, return_counts=True)
    for m in range(order, 0, -1):
        levels.append(_smooth(grams, counts, bits, discount))
        if m > 1:
            grams, counts = np.unique(grams & _mask(bits * (m - 1)), return_counts=True)
    return Ngram(vocab, tuple(reversed(levels)))


def probabilities(model: Ngram, keys: Keys) -> Floats:
    """(T,) the probability of the last token of each key after the tokens before it.

    `keys` may come from `pack` with a higher order: the oldest tokens are then ignored.
    """
    bits = bits_of(model.vocab)
    chance = np.full(len(keys), 1.0 / model.vocab)
    for m, level in enumerate(model.levels, start=1):
        grams = keys & _mask(bits * m)
        # an unseen context leaves the order below as it is
        seen, backoff = _look_up(level.contexts, level.backoff, grams >> np.uint64(bits))
        _, mass = _look_up(level.grams, level.mass, grams)
        chance = np.where(seen, mass + backoff * chance, chance)
    return chance


def _smooth(grams: Keys, counts: npt.NDArray[np.int64], bits: int, discount: float | None) -> Level:
    """grams (K,) sorted, counts (K,) -> the level."""
    taken = _discounts(counts, discount)[np.minimum(counts, 3)]
    contexts = grams >> np.uint64(bits)
    starts = np.concatenate([[0], np.flatnonzero(contexts[1:] != contexts[:-1]) + 1])
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    repeats = np.diff(np.append(starts, len(grams)))
    return Level(
        grams=grams,
        mass=(counts - taken) / np.repeat(totals, repeats),
        contexts=contexts[starts],
        backoff=np.add.reduceat(taken, starts) / totals,
    )


def _discounts(counts: npt.NDArray[np.int64], discount: float | None) -> Floats:
    """(4,) what is taken off a count of 0, 1, 2, and 3 or more."""
    if discount is not None:
        return np.asarray([0.0, discount, discount, discount])
    ones, twos, threes, fours = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    estimates = FALLBACK_DISCOUNTS
    if min(ones, twos, threes, fours) > 0:
        y = ones / (ones + 2 * twos)
        found = (1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes)
        if all(0 < value < n for n, value in enumerate(found, start=1)):
            estimates = found
    return np.asarray([0.0, *estimates])


def _look_up(table: Keys, values: Floats, wanted: Keys) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which of `wanted` are in the sorted table, and their values (0 where absent)."""
    places = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    found = table[places] == wanted
    return found, np.where(found, values[places], 0.0)


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
