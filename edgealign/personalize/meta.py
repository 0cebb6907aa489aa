"""MRM: reward directions and a start for users' weights from which one step goes far (MAML; arXiv 2601.18731).

    w = start + sum_i sigmoid(-margin_i) gap_i directions / (SATURATION + k),     margin_i = gap_i directions start

Directions and start are learned through that step: on a seen user's other choices, where users who are served worse
than the median weigh more (as released: sigmoid((loss - median) / 0.5)). Ours: signed weights (released: a softmax of
two), the step's size learned with the rest and its reach chosen on held-out users (released: Adam at 0.001, the best
epoch on the test set), more choices move a user further.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from edgealign.personalize.heads import Choices, Floats, State, learn_calibrated
from edgealign.personalize.lore import fit_population
from edgealign.personalize.neural_process import pick_choices, split_context, stack_users

RANK, STEPS, BATCH, RATE, RIDGE, SATURATION, SOFTNESS = 8, 600, 64, 0.01, 1e-3, 4.0, 0.5
REACHES = (1e-6, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)  # the first: everybody stays at the start


@dataclass(frozen=True)
class Meta:
    """`start`: everybody's weights of the directions, into which the learned rate is folded."""

    directions: Annotated[Floats, "F B"]
    start: Annotated[Floats, "B"]
    scale: Annotated[Floats, "F"]
    reach: float = 1.0
    name: ClassVar[str] = "mrm"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, rank: int = RANK, steps: int = STEPS) -> Meta:
        return learn_calibrated(partial(_learn, seed=seed, rank=rank, steps=steps), choices, "reach", REACHES, seed)

    @property
    def state_size(self) -> int:
        return len(self.start)

    def fit(self, choices: Choices) -> State:
        start = torch.from_numpy(self.start)
        there = torch.ones(1, len(choices), dtype=torch.float64)
        moved = _step(self._project(choices)[None], there, start)[0] - start
        found: State = (start + self.reach * moved).numpy().astype(np.float32)
        return found

    def margins(self, state: State, pairs: Choices) -> Floats:
        found: Floats = self._project(pairs).numpy() @ state.astype(np.float64)
        return found

    def _project(self, pairs: Choices) -> Tensor:
        chosen, rejected = pairs.scaled(self.scale)
        return (chosen - rejected) @ torch.from_numpy(self.directions)


def _step(projected: Tensor, there: Tensor, start: Tensor) -> Tensor:
    """(U, k, B) and (U, k) which choices there are -> (U, B), one step of descent from the start."""
    wrong = torch.sigmoid(-(projected @ start)) * there
    return start + torch.einsum("ukb,uk->ub", projected, wrong) / (SATURATION + there.sum(1, keepdim=True))


def _learn(choices: Choices, *, seed: int, rank: int, steps: int) -> Meta:
    """The first direction begins as everybody's, at a weight of 1; the others are random and unused."""
    scale = choices.gaps.std(0).clip(min=1e-9)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    people = list(choices.by_user())
    sides = stack_users(people, scale)
    chosen, rejected = choices.scaled(scale)
    width = chosen.shape[1]
    directions = 0.5 * torch.randn(width, rank, generator=generator, dtype=torch.float64) / width**0.5
    directions[:, 0] = fit_population(chosen - rejected, RIDGE)
    start = torch.zeros(rank, dtype=torch.float64)
    start[0] = 1.0
    optimizer = torch.optim.Adam([directions.requires_grad_(), start.requires_grad_()], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = rng.integers(0, len(people), min(BATCH, len(people)))
        splits = [split_context(rng, len(people[place])) for place in batch]
        (near, far, own), (first, second, asked) = (
            pick_choices(sides, batch, [split[part] for split in splits]) for part in (0, 1)
        )
        weights = _step((near - far) @ directions, own.double(), start)
        margin = torch.einsum("ukb,ub->uk", (first - second) @ directions, weights)
        losses = (torch.nn.functional.softplus(-margin) * asked).sum(1) / asked.sum(1)
        robust = torch.sigmoid((losses - losses.median()) / SOFTNESS).detach()
        loss = (losses * robust).sum() / robust.sum() + 0.5 * RIDGE * (directions**2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Meta(directions.detach().numpy(), start.detach().numpy(), scale)
