"""How good a model is on rows that it was not trained on, without generating anything.

Pairs: does the model itself rank the chosen answer above the rejected one? The score of an answer is its mean
log-probability per token, so that length alone wins nothing. Reported are the ranking accuracy (a tie counts half),
the mean margin, and the log loss of a logistic model with the slope of length-normalised DPO, which moves before the
accuracy does. Conversations and text: the mean negative log-likelihood per learned token.

Shape legend: P pairs, N learned tokens of all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgealign.train.layout import Tree
from edgealign.train.scoring import Passes, score

SLOPE = 5.0  # beta of ln_dpo: the log loss is that objective's loss, without a reference


@dataclass(frozen=True)
class Ranking:
    """How a model ranks pairs; `margin` is the mean difference in nats per token."""

    accuracy: float
    margin: float
    log_loss: float
    pairs: int


def rank_pairs(model: nn.Module, trees: Sequence[Tree], passes: Passes, *, label: str = "ranking") -> Ranking:
    """Rank the pairs (`layout.pair`) by the model's own likelihoods."""
    return summarise(margins(score(model, trees, passes, label=label), trees))


def margins(values: Tensor, trees: Sequence[Tree]) -> Tensor:
    """values (N,) log-probabilities as `score` returns them -> (P,) mean per token of chosen minus rejected."""
    counts = [len(tree.segments[leaf].ids) for tree in trees for leaf in tree.leaves]
    means = [part.double().mean() for part in torch.split(values, counts)]
    return torch.stack([means[i] - means[i + 1] for i in range(0, len(means), 2)])


def summarise(differences: Tensor) -> Ranking:
    """differences (P,), as `margins` makes them."""
    hits = (differences > 0).double() + 0.5 * (differences == 0).double()
    loss = -torch.nn.functional.logsigmoid(SLOPE * differences)
    return Ranking(float(hits.mean()), float(differences.mean()), float(loss.mean()), int(differences.numel()))


def mean_nll(model: nn.Module, trees: Sequence[Tree], passes: Passes, *, label: str = "likelihood") -> float:
    """Mean negative log-likelihood per learned token."""
    return -float(score(model, trees, passes, label=label).double().mean())
