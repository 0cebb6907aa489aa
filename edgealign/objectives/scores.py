"""What a preference objective reads: per-token log-probabilities of sequences, and which tokens count.

Nothing here knows a model. Shape legend: S sequences, L longest sequence, N learned tokens in all, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Per-token values of several sequences, one after the other."""

    values: Tensor  # (N,)
    sequence: Tensor  # (N,) which sequence a value belongs to, ascending
    lengths: Tensor  # (S,)


@dataclass(frozen=True)
class Scores:
    """Per-token log-probabilities (S, L), zero where `mask` is False."""

    values: Tensor  # (S, L) float
    mask: Tensor  # (S, L) bool

    @property
    def lengths(self) -> Tensor:
        """(S,) float: learned tokens per sequence."""
        return self.mask.sum(-1).to(self.values.dtype)

    def select(self, index: Tensor | slice) -> Scores:
        """Some of the sequences."""
        return Scores(self.values[index], self.mask[index])

    def detach(self) -> Scores:
        return Scores(self.values.detach(), self.mask)


def pad_ragged(ragged: Ragged) -> Scores:
    """(N,) values of sequences as an (S, L) table."""
    lengths = ragged.lengths
    longest = int(lengths.max()) if lengths.numel() else 0
    starts = torch.cumsum(lengths, 0) - lengths  # (S,)
    column = torch.arange(ragged.values.numel(), device=lengths.device) - starts[ragged.sequence]
    table = ragged.values.new_zeros(lengths.numel(), longest)
    table = table.index_put((ragged.sequence, column), ragged.values)
    mask = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
    return Scores(table, mask)


def split_pairs(scores: Scores) -> tuple[Scores, Scores]:
    """Chosen and rejected of sequences in the order chosen 0, rejected 0, chosen 1, ..., as `layout.pair` lays them."""
    return scores.select(slice(0, None, 2)), scores.select(slice(1, None, 2))
