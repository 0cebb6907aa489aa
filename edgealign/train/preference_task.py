"""Preference pairs as a task: from log-probabilities to an objective's loss, with all that it reads beside them.

Shape legend: N learned tokens of the examples at hand, P pairs, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgealign.data.forms import PAIR_NUMBERS
from edgealign.objectives.lists import list_loss
from edgealign.objectives.loss import pair_loss, pair_metrics
from edgealign.objectives.pairs import State
from edgealign.objectives.scores import Ragged, Scores, pad_ragged
from edgealign.objectives.states import Seen, remember
from edgealign.objectives.table import Objective
from edgealign.train import processes
from edgealign.train.anchors import Anchors
from edgealign.train.layout import Batch, Tree
from edgealign.train.online import OnlineAnswers
from edgealign.train.tasks import Learned, PerToken


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
    anchors: Anchors | None = None  # what else the reference says
    online: OnlineAnswers | None = None  # answers drawn before each step; `trees` is its list

    @property
    def couples(self) -> bool:
        return self.objective.couples

    def weight(self, index: int) -> int:
        return 1

    def attach(self, batch: Batch, indices: Sequence[int]) -> Batch:
        return batch if self.anchors is None else self.anchors.attach(batch, indices)

    @property
    def draws(self) -> bool:
        return self.online is not None

    def draw(self, model: nn.Module, indices: Sequence[int], step: int) -> None:
        assert self.online is not None
        self.online.draw(model, indices, step)

    def loss(self, logps: Tensor, batch: Batch | Learned, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        def table(values: Tensor) -> Scores:
            return pad_ragged(Ragged(values.to(logps.device), batch.sequence, batch.lengths))

        columns: dict[str, Any] = self._columns(indices)
        if logps.dim() == 2:  # with KL(ref || pi), see Anchors
            columns["token_kl"] = table(logps[:, 1]).values
            logps = logps[:, 0]
        every = table(logps)
        taken = [None if scores is None else scores.take(indices) for scores in (self.reference, self.second)]
        if self.reference is not None and self.online is not None:
            taken[0] = self.online.with_reference(self.reference.take, indices)
        fixed = [None if values is None else table(values) for values in taken]
        if self.objective.is_list:
            return self._list_loss(every, fixed[0], indices)
        (policy, *texts), (reference, *of_reference), (second, *_) = (self._split(each) for each in (every, *fixed))
        assert policy is not None
        names = (*self.objective.texts, *(["online"] if self.online else []))
        columns |= dict(zip(names, texts, strict=True))
        columns |= {f"{name}_reference": each for name, each in zip(names, of_reference, strict=True)}
        if self.objective.second_model:
            columns[self.objective.second_model] = second
        if self.anchors is not None and self.anchors.weights is not None:
            weights = table(self.anchors.weights.take(indices)).values
            columns |= {"token_weights": weights, "kl_weights": weights}
        if "spans" in self.objective.columns:
            flags = [flag for i in indices for flag in self.trees[i].facts["spans"]]
            columns["spans"] = table(torch.tensor(flags, dtype=torch.float32)).values > 0
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
        if self.online is not None:
            self.online.forget()

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
        """The pairs' sequences, those of each of the objective's texts, (P, L), and the answers drawn, (P K, L)."""
        n_texts, drawn = len(self.objective.texts), self.online.samples if self.online else 0
        if scores is None:
            return [None] * (1 + n_texts + bool(drawn))
        place = torch.arange(len(scores.values), device=scores.values.device).view(-1, 2 + n_texts + drawn)
        parts = [place[:, :2].flatten(), *(place[:, 2 + i] for i in range(n_texts))]
        if drawn:
            parts.append(place[:, 2 + n_texts :].flatten())
        return [scores.select(part) for part in parts] if len(parts) > 1 else [scores]

    def _columns(self, indices: Sequence[int]) -> dict[str, Any]:
        """What the rows of these pairs say, of what the objective reads."""
        facts = [self.trees[i].facts for i in indices]
        columns: dict[str, Any] = {}
        for name in ("margin", *PAIR_NUMBERS):
            if name in self.objective.columns:
                columns[name] = torch.tensor([float(each[name]) for each in facts])
        if "user" in self.objective.columns:
            columns["user"] = torch.tensor([self.users.index(each["user"]) for each in facts])
        if self.anchors is not None and self.anchors.features is not None:
            columns["prompt_features"] = self.anchors.features[list(indices)]
        return columns
