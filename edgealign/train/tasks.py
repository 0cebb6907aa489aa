"""What a run learns from: examples with a loss on their log-probabilities. One engine, two tasks.

A task never sees the model. It gets the log-probabilities of the learned tokens of some examples and returns a
*summed* loss and summed metrics; the trainer divides by the weight of the whole optimizer step, so that the size
of a forward pass never changes a gradient (per token for SFT, per pair for preferences).

Shape legend: N learned tokens of the examples at hand, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from edgealign.data.forms import PAIR_NUMBERS
from edgealign.objectives.lists import list_loss
from edgealign.objectives.loss import pair_loss, pair_metrics
from edgealign.objectives.pairs import State
from edgealign.objectives.scores import Ragged, Scores, pad_ragged
from edgealign.objectives.states import Seen, remember
from edgealign.objectives.table import Objective
from edgealign.train import processes
from edgealign.train.layout import Batch, Tree


class Task(Protocol):
    """`weight`: an example's share of the divisor; `loss`: summed loss, and summed metrics that share it."""

    @property
    def trees(self) -> Sequence[Tree]: ...
    def weight(self, index: int) -> int: ...
    def loss(self, logps: Tensor, batch: Batch, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]: ...


@runtime_checkable
class Remembers(Protocol):
    """A task whose loss depends on earlier steps. Checkpoints hold `state`; no step sees what it adds itself."""

    state: State

    def begin(self, state: State) -> None:
        """Start, or go on from a checkpoint's state."""

    def end_step(self) -> None:
        """Every pass of an optimizer step is done, in every process."""


@dataclass(frozen=True)
class SftTask:
    """Negative log-likelihood per learned token."""

    trees: Sequence[Tree]

    def weight(self, index: int) -> int:
        return self.trees[index].n_learned

    def loss(self, logps: Tensor, batch: Batch, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        return -logps.sum(), {}


@dataclass(frozen=True)
class PerToken:
    """Values of the learned tokens of many examples, one after the other: reference log-probabilities."""

    values: Tensor  # (sum of n_learned,)
    starts: tuple[int, ...]  # one more than there are examples

    @staticmethod
    def of(values: Tensor, trees: Sequence[Tree]) -> PerToken:
        starts = [0]
        for tree in trees:
            starts.append(starts[-1] + tree.n_learned)
        if starts[-1] != values.numel():
            raise ValueError(f"{values.numel()} values for {starts[-1]} learned tokens")
        return PerToken(values, tuple(starts))

    def take(self, indices: Sequence[int]) -> Tensor:
        """(N,) the values of some examples, in the order asked for."""
        return torch.cat([self.values[self.starts[i] : self.starts[i + 1]] for i in indices])


@dataclass(frozen=True)
class PreferenceTask:
    """A preference objective on pairs; every tree has the sequences chosen, rejected, and the objective's `texts`, or,
    where it is one of ranked lists, any number of further answers.

    `state` is what an objective remembers of earlier steps: training replaces its values, evaluation reads them.
    """

    trees: Sequence[Tree]
    objective: Objective
    beta: float
    reference: PerToken | None
    settings: Mapping[str, float] = field(default_factory=dict)
    users: tuple[str, ...] = ()  # the number of a user is its place here
    state: State = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)  # what the passes of this step will have changed of it
    second: PerToken | None = None  # the scores of a second model, for the objectives that read two

    def weight(self, index: int) -> int:
        return 1

    def loss(self, logps: Tensor, batch: Batch, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        every = pad_ragged(Ragged(logps, batch.sequence, batch.lengths))
        fixed = [
            None if scores is None else pad_ragged(
                Ragged(scores.take(indices).to(logps.device), batch.sequence, batch.lengths)
            )
            for scores in (self.reference, self.second)
        ]  # fmt: skip
        if self.objective.is_list:
            return self._list_loss(every, fixed[0], indices)
        (policy, *texts), (reference, *of_reference), (second, *_) = (self._split(each) for each in (every, *fixed))
        assert policy is not None
        columns: dict[str, Any] = {**self._columns(indices), **dict(zip(self.objective.texts, texts, strict=True))}
        columns |= {f"{name}_reference": each for name, each in zip(self.objective.texts, of_reference, strict=True)}
        if self.objective.second_model:
            columns[self.objective.second_model] = second
        result = pair_loss(
            self.objective, policy, reference, beta=self.beta, settings=self.settings, state=self.state,
            columns=columns,
        )  # fmt: skip
        if torch.is_grad_enabled():
            self.seen.append(result.seen)
        metrics = pair_metrics(self.objective, policy, reference)
        return result.loss.sum(), {name: float(value.sum()) for name, value in metrics.items()}

    def begin(self, state: State) -> None:
        self.seen.clear()
        self.state.clear()
        self.state.update(state)

    def end_step(self) -> None:
        """All processes remember the same: what every one of them has seen."""
        seen = [each for part in processes.gather(self.seen) for each in part] if self.objective.state else []
        self.begin(remember(self.objective, dict(self.state), seen, self.settings))

    def _list_loss(
        self, every: Scores, reference: Scores | None, indices: Sequence[int]
    ) -> tuple[Tensor, dict[str, float]]:
        """The sum over lists, which may be of different lengths; metrics are of their chosen and rejected answers."""
        losses, pairs, start = [], list[int](), 0
        for i in indices:
            grades = torch.tensor([self.trees[i].facts["grades"]], device=every.values.device)  # (1, K)
            part = slice(start, start + grades.shape[1])
            theirs = None if reference is None else reference.select(part)
            losses.append(list_loss(
                self.objective, every.select(part), grades, theirs, beta=self.beta, settings=self.settings
            ))  # fmt: skip
            pairs += [start, start + 1]
            start += grades.shape[1]
        place = torch.tensor(pairs, device=every.values.device)
        metrics = pair_metrics(self.objective, every.select(place), reference and reference.select(place))
        return torch.cat(losses).sum(), {name: float(value.sum()) for name, value in metrics.items()}

    def _split(self, scores: Scores | None) -> list[Scores | None]:
        """The pairs' sequences, then those of each of the objective's texts, (P, L)."""
        each = 2 + len(self.objective.texts)
        if scores is None:
            return [None] * (each - 1)
        if each == 2:
            return [scores]
        place = torch.arange(len(scores.values), device=scores.values.device).view(-1, each)
        return [scores.select(place[:, :2].flatten()), *(scores.select(place[:, i]) for i in range(2, each))]

    def _columns(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the rows of these pairs say, of what the objective reads."""
        facts = [self.trees[i].facts for i in indices]
        columns: dict[str, Tensor] = {}
        for name in ("margin", *PAIR_NUMBERS):
            if name in self.objective.columns:
                columns[name] = torch.tensor([float(each[name]) for each in facts])
        if "user" in self.objective.columns:
            columns["user"] = torch.tensor([self.users.index(each["user"]) for each in facts])
        return columns
