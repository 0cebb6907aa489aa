"""What a run learns from: examples with a loss on their log-probabilities. One engine, several tasks.

A task gets the log-probabilities of the learned tokens of some examples and returns a *summed* loss and summed
metrics; the trainer divides by the weight of the whole optimizer step, so that the size of a forward pass never
changes a gradient (per token for SFT, per pair for preferences). What a task may ask for beside that are the protocols
here: `Remembers`, `Attaches`, `Couples`, `Draws`. The one on pairs is in `preference_task`.

Shape legend: N learned tokens of the examples at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgealign.objectives.pairs import State
from edgealign.train.layout import Batch, Tree


@dataclass(frozen=True)
class Learned:
    """What came of some passes: log-probabilities, and which sequences they belong to."""

    logps: Tensor  # (N,)
    sequence: Tensor  # (N,) int64
    lengths: Tensor  # (S,) int64

    @staticmethod
    def join(parts: Sequence[Learned]) -> Learned:
        """Several as one; sequences are numbered on."""
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.lengths.numel())
        return Learned(
            torch.cat([part.logps for part in parts]),
            torch.cat([part.sequence + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part.lengths for part in parts]),
        )


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


@runtime_checkable
class Attaches(Protocol):
    """A task that has the model compute more than log-probabilities, of what it adds to a batch."""

    def attach(self, batch: Batch, indices: Sequence[int]) -> Batch:
        """The batch of these examples with what it needs, on the same device."""


@runtime_checkable
class Couples(Protocol):
    """A task whose examples are compared with each other, if `couples`: its loss is of a whole step at once."""

    @property
    def couples(self) -> bool: ...
    @property
    def trees(self) -> Sequence[Tree]: ...
    def loss(self, logps: Tensor, batch: Batch | Learned, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """As `Task.loss`."""


@runtime_checkable
class Draws(Protocol):
    """A task that has the model answer before each step, if `draws`; its trees hold the answers until the step's end.
    """

    @property
    def draws(self) -> bool: ...
    def draw(self, model: nn.Module, indices: Sequence[int], step: int) -> None:
        """Answers of `model` as it is now to the prompts of a step's examples."""


def coupled(task: Task) -> Couples | None:
    """The task, if its examples are compared with each other."""
    return task if isinstance(task, Couples) and task.couples else None


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
    """Values of the learned tokens of many examples, one after the other: reference log-probabilities, say."""

    values: Tensor  # (sum of n_learned, ...)
    starts: tuple[int, ...]  # one more than there are examples

    @staticmethod
    def of(values: Tensor, trees: Sequence[Tree]) -> PerToken:
        starts = [0]
        for tree in trees:
            starts.append(starts[-1] + tree.n_learned)
        if starts[-1] != len(values):
            raise ValueError(f"{len(values)} values for {starts[-1]} learned tokens")
        return PerToken(values, tuple(starts))

    def take(self, indices: Sequence[int]) -> Tensor:
        """(N, ...) the values of some examples, in the order asked for."""
        return torch.cat([self.values[self.starts[i] : self.starts[i + 1]] for i in indices])
