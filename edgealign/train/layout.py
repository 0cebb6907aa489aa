"""One batch layout for every loss: rows of segments, each continuing a parent segment or nothing.

A *tree* is one training example. A document is a single root segment; a preference pair is a prompt
with two children, `chosen` and `rejected`, so that the prompt they share is computed once. A *row*
holds any number of trees one after the other, without padding. Three things keep them apart:

- attention: a token sees the tokens of its own segment up to itself, and all of its ancestors;
- positions: a segment counts on from the end of its parent, so rotary angles are those of the text alone;
- short convolutions: each token names its predecessors along its own ancestor path ("taps"), so the
  kernel window crosses a segment boundary only into the parent (`shortconv.py` reads the taps).

A *sequence* is a leaf segment; only leaves may hold learned tokens. Sequences are numbered in the order of
the trees given, and within a tree in the order of its segments: pair `i` of a batch of pairs has its chosen
completion as sequence `2 i` and its rejected one as `2 i + 1`.

Shape legend: B rows, T tokens in a row, K kernel width of the short convolution, N learned tokens in the
batch, S sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_PARENT = -1
_PAD_SEGMENT = -1
# One row of 1,120 tokens spends 13 % of a step of the 350M shape in attention, four of 280 spend 4 %: in a row of this
# length attention would cost as much as everything else.
ATTENTION_ROW = 7500
SHORT_ROW = 128  # shorter rows gain nothing
SPARE_SHARE = 0.1  # more padding than this, and it is one long row


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens; `learned` says which of them a loss reads; `parent` is an earlier segment's index."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    parent: int = NO_PARENT


@dataclass(frozen=True)
class Tree:
    """One training example: segments in an order in which parents come before their children.

    `facts`: what else its row says that an objective may read (`margin`, `user`).
    """

    segments: tuple[Segment, ...]
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def n_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the segments that no other segment continues: the sequences of this tree."""
        parents = {segment.parent for segment in self.segments}
        return tuple(i for i in range(len(self.segments)) if i not in parents)

    @property
    def n_learned(self) -> int:
        """How many tokens a loss reads (a learned token without any predecessor cannot be predicted)."""
        total = 0
        for segment in self.segments:
            count = sum(segment.learned)
            if count and segment.learned[0] and not self._has_context(segment):
                count -= 1
            total += count
        return total

    def _has_context(self, segment: Segment) -> bool:
        while segment.parent != NO_PARENT:
            segment = self.segments[segment.parent]
            if segment.ids:
                return True
        return False


def document(ids: Sequence[int], learned: Sequence[bool]) -> Tree:
    """A tree of one segment: a conversation or a text."""
    return Tree((Segment(tuple(ids), tuple(learned)),))


def branches(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Tree:
    """A prompt and any number of completions of it; every completion token is learned."""
    root = Segment(tuple(prompt), (False,) * len(prompt))
    return Tree((root, *(Segment(tuple(ids), (True,) * len(ids), 0) for ids in completions)))


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Tree:
    """A preference pair; its sequences are the chosen and the rejected completion, in this order."""
    return branches(prompt, (chosen, rejected))


@dataclass(frozen=True)
class Anchor:
    """What gives the reference's distribution at the learned tokens of a batch: its final states and its head."""

    states: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)


@dataclass(frozen=True)
class Batch:
    """Tensors of some rows; `token_logprobs` reads it, and `.to(device)` moves it."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64
    allowed: Tensor  # (B, 1, T, T) bool: query may read key
    taps: Tensor  # (K-1, B*T) int64: flat index of the predecessor at distance 1..K-1, B*T where there is none
    source: Tensor  # (N,) int64: flat index of the token whose hidden state predicts the learned token
    target: Tensor  # (N,) int64: id of the learned token
    sequence: Tensor  # (N,) int64: the sequence that the learned token belongs to
    lengths: Tensor  # (S,) int64: learned tokens per sequence
    n_tokens: int  # real tokens, without padding
    candidates: Tensor | None = None  # (N, K) int64: tokens whose log-probabilities a loss reads beside the target's
    teacher: Tensor | None = None  # (N, K) float32: a teacher's log-probabilities of them
    anchor: Anchor | None = None  # for a KL divergence from the reference at every learned token

    @property
    def n_sequences(self) -> int:
        return int(self.lengths.numel())

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def pack(trees: Sequence[Tree], *, kernel: int = 1, pad_id: int = 0) -> Batch:
    """All trees in one row, B = 1, no padding: the layout of training."""
    return lay_out([trees], kernel=kernel, pad_id=pad_id)


def stack(trees: Sequence[Tree], *, kernel: int = 1, pad_id: int = 0) -> Batch:
    """One row per tree, shorter rows padded on the right."""
    return lay_out([[tree] for tree in trees], kernel=kernel, pad_id=pad_id)


def lay_out(rows: Sequence[Sequence[Tree]], *, kernel: int = 1, pad_id: int = 0) -> Batch:
    """Rows of trees as one `Batch`; `kernel` is the width K of the model's short convolution (1: it has none)."""
    width = max((sum(tree.n_tokens for tree in row) for row in rows), default=0)
    if width == 0:
        raise ValueError("nothing to lay out: every row is empty")
    n_flat = len(rows) * width
    shape = (len(rows), width)
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    allowed = np.zeros((*shape, width), dtype=bool)
    previous = np.full(n_flat + 1, n_flat, dtype=np.int64)  # the last entry: "no predecessor" has none either
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    lengths: list[int] = []
    n_tokens = 0
    for r, row in enumerate(rows):
        plan = _RowPlan(offset=r * width)
        for tree in row:
            _place(tree, plan, n_flat)
        n = len(plan.ids)
        n_tokens += n
        ids[r, :n] = plan.ids
        positions[r, :n] = plan.positions
        previous[r * width : r * width + n] = plan.previous
        allowed[r] = _visible(plan, width)
        source.extend(plan.source)
        target.extend(plan.target)
        lengths.extend(plan.lengths)
    taps = np.empty((max(kernel - 1, 0), n_flat), dtype=np.int64)
    reach = np.arange(n_flat + 1)
    for distance in range(taps.shape[0]):
        reach = previous[reach]
        taps[distance] = reach[:n_flat]
    sources = np.concatenate(source) if source else np.empty(0, dtype=np.int64)
    targets = np.concatenate(target) if target else np.empty(0, dtype=np.int64)
    counts = np.asarray(lengths, dtype=np.int64)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        allowed=torch.from_numpy(allowed)[:, None],
        taps=torch.from_numpy(taps),
        source=torch.from_numpy(sources),
        target=torch.from_numpy(targets),
        sequence=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        lengths=torch.from_numpy(counts),
        n_tokens=n_tokens,
    )


def split_by_tokens(n_tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of examples, grouped so that no group is over `budget` tokens (an example over it stands alone).

    As few groups as first fit needs (longest first), then filled evenly where that keeps to the budget: eight examples
    of 280 tokens are four and four rather than seven and one, and the largest group decides how much memory a step
    needs. The result depends on the lengths alone, never on chance.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in _longest_first(n_tokens):
        slot = next((g for g, free in enumerate(room) if free >= n_tokens[i]), None)
        if slot is None:
            groups.append([i])
            room.append(budget - n_tokens[i])
        else:
            groups[slot].append(i)
            room[slot] -= n_tokens[i]
    even = spread(n_tokens, len(groups))
    fits = all(sum(n_tokens[i] for i in group) <= budget for group in even)
    return even if fits else groups


def split_for(n_tokens: Sequence[int], budget: int, parts: int) -> list[list[int]]:
    """As `split_by_tokens`, in a number of groups that `parts` divides, or else of one example each."""
    groups = split_by_tokens(n_tokens, budget)
    count = len(groups)
    while len(groups) % parts and len(groups) < len(n_tokens):
        count += -count % parts or parts
        even = spread(n_tokens, count)
        if all(sum(n_tokens[i] for i in group) <= budget or len(group) == 1 for group in even):
            groups = even
    return groups


def spread(n_tokens: Sequence[int], count: int) -> list[list[int]]:
    """Indices in `count` groups of about the same number of tokens: longest first, each to the emptiest group."""
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, g) for g in range(count)]
    for i in _longest_first(n_tokens):
        tokens, g = heapq.heappop(filled)
        groups[g].append(i)
        heapq.heappush(filled, (tokens + n_tokens[i], g))
    return [group for group in groups if group]


def arrange(n_tokens: Sequence[int]) -> list[int]:
    """An order of the examples of one batch in which `split_in_rows` finds rows of about the same length."""
    return [i for row in _best_rows(n_tokens) for i in row]


def split_in_rows(n_tokens: Sequence[int]) -> list[list[int]]:
    """Neighbouring examples of one batch, in order, in rows: attention costs the square of a row, padding costs too."""
    width = _width(n_tokens, _best_rows(n_tokens))
    rows: list[list[int]] = []
    filled = width
    for i, n in enumerate(n_tokens):
        if filled + n > width:
            rows.append([])
            filled = 0
        rows[-1].append(i)
        filled += n
    padded = len(rows) * _width(n_tokens, rows)
    return rows if padded <= (1.0 + SPARE_SHARE) * sum(n_tokens) else [list(range(len(n_tokens)))]


def _best_rows(n_tokens: Sequence[int]) -> list[list[int]]:
    """The cheapest number of rows: the tokens of all, padding included, each with its share of attention."""
    best, least = [list(range(len(n_tokens)))], float("inf")
    for count in range(1, max(2, min(len(n_tokens), sum(n_tokens) // SHORT_ROW) + 1)):
        rows = spread(n_tokens, count)
        width = _width(n_tokens, rows)
        cost = len(rows) * width * (1.0 + max(width, SHORT_ROW) / ATTENTION_ROW)
        if cost < least:
            best, least = rows, cost
    return best


def _width(n_tokens: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    return max((sum(n_tokens[i] for i in row) for row in rows), default=0)


def _longest_first(n_tokens: Sequence[int]) -> list[int]:
    return sorted(range(len(n_tokens)), key=lambda i: (-n_tokens[i], i))


class _RowPlan:
    """What a row has collected so far, in flat indices of the whole batch."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.previous: list[int] = []
        self.segment_of: list[int] = []  # (tokens,) row-wide segment number
        self.ancestors: list[set[int]] = []  # per row-wide segment, itself included
        self.source: list[np.ndarray] = []
        self.target: list[np.ndarray] = []
        self.lengths: list[int] = []


def _place(tree: Tree, plan: _RowPlan, n_flat: int) -> None:
    """Append one tree to a row."""
    base = len(plan.ancestors)
    leaves = set(tree.leaves)
    last: list[int] = []  # per segment: flat index of the last token up to its end, n_flat if there is none
    end: list[int] = []  # per segment: the position that its child starts with
    for i, segment in enumerate(tree.segments):
        if not NO_PARENT <= segment.parent < i:
            raise ValueError(f"segment {i}: parent {segment.parent} does not come before it")
        if len(segment.learned) != len(segment.ids):
            raise ValueError(f"segment {i}: {len(segment.ids)} tokens but {len(segment.learned)} learned flags")
        if i not in leaves and any(segment.learned):
            raise ValueError(f"segment {i}: only a segment without children may hold learned tokens")
        orphan = segment.parent == NO_PARENT
        start, before = (0, n_flat) if orphan else (end[segment.parent], last[segment.parent])
        n = len(segment.ids)
        first = plan.offset + len(plan.ids)
        previous = [before, *range(first, first + n - 1)] if n else []
        plan.ids.extend(segment.ids)
        plan.positions.extend(range(start, start + n))
        plan.previous.extend(previous)
        plan.segment_of.extend([base + i] * n)
        plan.ancestors.append({base + i} | (set() if orphan else plan.ancestors[base + segment.parent]))
        end.append(start + n)
        last.append(first + n - 1 if n else before)
        if i in leaves:
            counted = np.asarray(segment.learned, dtype=bool) & (np.asarray(previous, dtype=np.int64) != n_flat)
            plan.source.append(np.asarray(previous, dtype=np.int64)[counted])
            plan.target.append(np.asarray(segment.ids, dtype=np.int64)[counted])
            plan.lengths.append(int(counted.sum()))


def _visible(plan: _RowPlan, width: int) -> np.ndarray:
    """(T, T): which keys each query reads. Padding reads padding, so that its softmax has something to sum."""
    n_segments = len(plan.ancestors)
    relation = np.zeros((n_segments + 1, n_segments + 1), dtype=bool)
    relation[_PAD_SEGMENT, _PAD_SEGMENT] = True
    for segment, ancestors in enumerate(plan.ancestors):
        relation[segment, sorted(ancestors)] = True
    segment_of = np.full(width, n_segments, dtype=np.int64)
    segment_of[: len(plan.segment_of)] = plan.segment_of
    visible: np.ndarray = relation[segment_of[:, None], segment_of[None, :]] & np.tri(width, dtype=bool)
    return visible
