"""How long the rows are, and whether the longer answer wins: lengths in tokens, or in words without a model.

Preference data mostly prefers the longer answer, and a loss that sums log-probabilities learns that first. The report
stands before training (mean gap, correlation, share of wins per gap); `ln_dpo` is the default because of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgealign.data.encode import encode_conversation, encode_pair, encode_text, encode_thumb
from edgealign.data.forms import Conversation, Message, Pair, Row, Text
from edgealign.errors import InputError

GAP_EDGES = (0, 1, 10, 25, 50, 100, 200)  # lower ends; the first bucket holds equal lengths only
PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Size:
    """Of one row: everything in its longest form, and its answers (chosen and rejected of a pair)."""

    whole: int
    answers: tuple[int, ...] = ()


def count_words(row: Row) -> Size:
    """Whitespace words, for want of a tokenizer."""
    if isinstance(row, Text):
        return Size(_words(row.text))
    if isinstance(row, Conversation):
        return Size(_words_of(row.messages))
    answers = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
    sizes = tuple(_words(answer) for answer in answers)
    return Size(_words_of(row.prompt) + max(sizes), sizes)


def count_tokens(tok: Any, row: Row) -> Size:
    """Tokens as training would see them, template included.

    Raises:
        InputError: the model's template or tokenizer refuses the row.
    """
    if isinstance(row, Text):
        return Size(sum(len(piece.ids) for piece in encode_text(tok, row.text, max_tokens=2**31)))
    if isinstance(row, Conversation):
        return Size(len(encode_conversation(tok, row.messages).ids))
    prompt, *answers = encode_pair(tok, row) if isinstance(row, Pair) else encode_thumb(tok, row)
    sizes = tuple(len(answer) for answer in answers)
    return Size(len(prompt) + max(sizes), sizes)


def measure(tok: Any | None, row: Row) -> Size | InputError:
    """The size of a row, or why the model cannot take it."""
    if tok is None:
        return count_words(row)
    try:
        return count_tokens(tok, row)
    except InputError as error:
        return error


def percentiles(values: Sequence[int]) -> dict[str, float]:
    """Nearest-rank percentiles with minimum, mean and maximum."""
    ordered = sorted(values)
    ranks = {f"p{q}": float(ordered[max(0, math.ceil(q / 100 * len(ordered)) - 1)]) for q in PERCENTILES}
    return {"min": float(ordered[0]), **ranks, "max": float(ordered[-1]), "mean": sum(ordered) / len(ordered)}


def length_bias(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of (chosen, rejected) lengths: how often the longer one wins, in all and per gap.

    `label_length_correlation` is Pearson's r of "is chosen" with length over all answers (both of each pair).
    """
    buckets = []
    for place, low in enumerate(GAP_EDGES):
        high = GAP_EDGES[place + 1] if place + 1 < len(GAP_EDGES) else None
        gaps = [(won, lost) for won, lost in sizes if low <= abs(won - lost) < (high or math.inf)]
        wins = sum(won > lost for won, lost in gaps)
        buckets.append(
            {
                "gap_from": low, "gap_below": high, "pairs": len(gaps), "longer_wins": wins,
                "share": wins / len(gaps) if gaps and low > 0 else None,
            }
        )
    unequal = [(won, lost) for won, lost in sizes if won != lost]
    lengths = [length for pair in sizes for length in pair]
    return {
        "pairs": len(sizes),
        "longer_wins_share": sum(won > lost for won, lost in unequal) / len(unequal) if unequal else None,
        "equal_length": len(sizes) - len(unequal),
        "mean_chosen": sum(won for won, _ in sizes) / len(sizes),
        "mean_rejected": sum(lost for _, lost in sizes) / len(sizes),
        "mean_gap": sum(won - lost for won, lost in sizes) / len(sizes),
        "label_length_correlation": correlation([1.0, 0.0] * len(sizes), [float(length) for length in lengths]),
        "buckets": buckets,
    }


def thumb_bias(labels: Sequence[bool], sizes: Sequence[int]) -> dict[str, Any]:
    """Of liked and disliked answers: how many, how long, and r of the label with the length."""
    liked = [size for label, size in zip(labels, sizes, strict=True) if label]
    disliked = [size for label, size in zip(labels, sizes, strict=True) if not label]
    return {
        "liked": len(liked),
        "disliked": len(disliked),
        "mean_liked": sum(liked) / len(liked) if liked else None,
        "mean_disliked": sum(disliked) / len(disliked) if disliked else None,
        "label_length_correlation": correlation([float(label) for label in labels], [float(size) for size in sizes]),
    }


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's r, or None where one side does not vary."""
    mean_1, mean_2 = sum(first) / len(first), sum(second) / len(second)
    cross = sum((a - mean_1) * (b - mean_2) for a, b in zip(first, second, strict=True))
    spread_1 = sum((a - mean_1) ** 2 for a in first)
    spread_2 = sum((b - mean_2) ** 2 for b in second)
    return cross / math.sqrt(spread_1 * spread_2) if spread_1 > 0 and spread_2 > 0 else None


def _words(text: str) -> int:
    return len(text.split())


def _words_of(messages: Sequence[Message]) -> int:
    return sum(_words(message.content) for message in messages)
