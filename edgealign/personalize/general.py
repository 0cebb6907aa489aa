"""GPM: preferences that may go in circles (arXiv 2410.02197), with a user's gates of the planes by MAP.

An answer is a vector of m planes, two numbers each; in plane j the score of two answers is the area between their
vectors, a_j(y1) b_j(y2) - b_j(y1) a_j(y2): it turns its sign with the answers, but need not be a difference of rewards.
A user prefers y1 by sum_j gate_j area_j; the gates are everybody's plus ways u, where u has the prior
N(0, 1 / precision) and is found by LoRe's Newton. `ways` is how the seen users' gates differ (empirical Bayes).

As in the paper: skew-symmetric planes, the logistic loss. Ours: linear embeddings of frozen features *with* a constant
(a plane with (w.y, 1) is Bradley-Terry, which is therefore included), no normalisation of the vectors (it would undo
that), and gates per user in place of gates per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from edgealign.personalize.heads import Choices, Floats, State, learn_calibrated, minimise
from edgealign.personalize.lore import fit_population, fit_ragged, fit_users

PLANES, STEPS, RIDGE = 8, 150, 1e-3
TURNING = 10.0  # how much dearer circles are than rewards: most tastes have none
EM_ROUNDS = 10
PRECISIONS = (0.5, 0.7, 1.0, 1.5, 2.0, 4.0, 8.0, 1e4)  # the last: nobody has gates of their own


@dataclass(frozen=True)
class General:
    """`first`, `second`: the two sides of each plane; `gates`: everybody's."""

    first: Annotated[Floats, "F M"]
    second: Annotated[Floats, "F M"]
    first_constant: Annotated[Floats, "M"]
    second_constant: Annotated[Floats, "M"]
    gates: Annotated[Floats, "M"]
    ways: Annotated[Floats, "M M"]
    scale: Annotated[Floats, "F"]
    precision: float = 1.0
    name: ClassVar[str] = "gpm"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, planes: int = PLANES) -> General:
        return learn_calibrated(partial(_learn, seed=seed, planes=planes), choices, "precision", PRECISIONS, seed)

    @property
    def state_size(self) -> int:
        return len(self.gates)

    def fit(self, choices: Choices) -> State:
        areas = self._areas(choices)
        offset = areas @ torch.from_numpy(self.gates)
        projected = torch.cat([offset[:, None], areas @ torch.from_numpy(self.ways)], 1)
        fitted = fit_users(projected[None], precision=self.precision)
        found: State = fitted.weights[0].astype(np.float32)
        return found

    def margins(self, state: State, pairs: Choices) -> Floats:
        found: Floats = self._areas(pairs).numpy() @ (self.gates + self.ways @ state.astype(np.float64))
        return found

    def _areas(self, choices: Choices) -> Tensor:
        """(N, M)"""
        parts = (self.first, self.second, self.first_constant, self.second_constant)
        return _areas(*choices.scaled(self.scale), *map(torch.from_numpy, parts))


def _areas(chosen: Tensor, rejected: Tensor, first: Tensor, second: Tensor, one: Tensor, two: Tensor) -> Tensor:
    here, there = chosen @ first + one, rejected @ first + one
    found: Tensor = here * (rejected @ second + two) - (chosen @ second + two) * there
    return found


def _learn(choices: Choices, *, seed: int, planes: int) -> General:
    """Planes, everybody's gates and the seen users' own, together."""
    scale = choices.gaps.std(0).clip(min=1e-9)
    chosen, rejected = choices.scaled(scale)
    names, place = np.unique(choices.users, return_inverse=True)
    who, width = torch.from_numpy(place), chosen.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        drawn: Tensor = 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64) / width**0.5
        return drawn

    # The first side is small, the second nearly the constant 1: rewards; one plane is everybody's.
    left, right, zero = random(width, planes), random(width, planes) * 0.3, torch.zeros(planes, dtype=torch.float64)
    left[:, 0] = 2 * fit_population(chosen - rejected, RIDGE)
    parts = [left, right, zero, zero + 1, zero + 0.5, torch.zeros(len(names), planes, dtype=torch.float64)]

    def loss() -> Tensor:
        own = parts[5]
        margin = (_areas(chosen, rejected, *parts[:4]) * (parts[4] + own[who])).sum(1)
        fit = torch.nn.functional.softplus(-margin).mean() + 0.5 * (own**2).sum() / len(who)
        shared = (parts[0] ** 2).sum() + (parts[4] ** 2).sum() + TURNING * (parts[1] ** 2).sum()
        value: Tensor = fit + 0.5 * RIDGE * shared
        return value

    found = minimise(parts, loss, STEPS)
    areas, gates, ways = _areas(chosen, rejected, *found[:4]), found[4], torch.eye(planes, dtype=torch.float64)
    for _ in range(EM_ROUNDS):
        fitted = fit_ragged(areas, who, gates, ways, len(names))
        weights = torch.from_numpy(fitted.weights)
        spread = torch.cov(weights.T).reshape(planes, planes) + torch.from_numpy(fitted.covariance).mean(0)
        gates, ways = gates + ways @ weights.mean(0), ways @ torch.linalg.cholesky(spread)
    first, second, one, two = (part.numpy() for part in found[:4])
    return General(first, second, one, two, gates.numpy(), ways.numpy(), scale)
