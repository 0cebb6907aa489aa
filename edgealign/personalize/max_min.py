"""MaxMin: groups of users by hard EM, and a shared reward for the group that is worst off (arXiv 2402.08925).

Each group has a linear reward. The reward for somebody unknown is a mix of them, chosen so that the group that gains
least from it gains most: a game between the mix and an adversary who weighs groups, played by multiplicative weights.
A new user's labels move the mix towards their group (Hedge, as in mixture.py).

As released: a user belongs to the group whose reward ranks their choices best, round-robin start, ten rounds. Ours: the
minimum is over the groups' *expected* rewards (the released minimum per sample lets one odd answer decide), rewards
are measured in their own deviations, weights are kept as logarithms (exponentials of rewards overflow), several starts.
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
from edgealign.personalize.mixture import TAUS, hedge

GROUPS, ROUNDS, STARTS, RIDGE = 4, 10, 4, 1e-2
GAME_ROUNDS, GAME_RATE = 400, 0.5


@dataclass(frozen=True)
class MaxMin:
    """`heads`: the groups' rewards; `prior`: logarithms of their weights in the shared one."""

    heads: Annotated[Floats, "K F"]
    prior: Annotated[Floats, "K"]
    scale: Annotated[Floats, "F"]
    tau: float = 1.0
    name: ClassVar[str] = "maxmin"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, groups: int = GROUPS) -> MaxMin:
        return learn_calibrated(partial(_learn, seed=seed, groups=groups), choices, "tau", TAUS, seed)

    @property
    def state_size(self) -> int:
        return len(self.prior)

    def fit(self, choices: Choices) -> State:
        return hedge(self._by_group(choices), self.tau)

    def margins(self, state: State, pairs: Choices) -> Floats:
        weights = softmax(self.prior + state.astype(np.float64))
        found: Floats = self._by_group(pairs) @ weights
        return found

    def _by_group(self, pairs: Choices) -> Floats:
        chosen, rejected = pairs.scaled(self.scale)
        found: Floats = (chosen - rejected).numpy() @ self.heads.T
        return found


def find_groups(
    gaps: Tensor, who: Tensor, count: int, groups: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(K, F) rewards and (U,) memberships, of the most likely of several hard-EM runs."""
    best: tuple[float, Tensor, Tensor] | None = None
    for start in range(STARTS):
        order = torch.arange(count) if not start else torch.randperm(count, generator=generator)
        member = order % groups
        heads = torch.zeros(groups, gaps.shape[1], dtype=gaps.dtype)
        total = -np.inf
        for _ in range(ROUNDS):
            for group in range(groups):
                rows = (member == group)[who]
                if rows.any():  # a group that nobody is in keeps its reward
                    heads[group] = fit_population(gaps[rows], RIDGE)
            right = torch.nn.functional.logsigmoid(gaps @ heads.T)
            likely = torch.zeros(count, groups, dtype=gaps.dtype).index_add_(0, who, right)
            total, before = float(likely.max(1).values.sum()), member
            member = likely.argmax(1)
            if bool((member == before).all()):
                break
        if best is None or total > best[0]:
            best = total, heads.clone(), member
    assert best is not None
    return best[1], best[2]


def weigh_groups(heads: Floats, pairs: Floats) -> Floats:
    """(K,) logarithms of the weights in the shared reward, for the largest least expected reward of a group.

    A group's expected reward is the mean of its own margin, in standard deviations, over pairs of which the shared
    reward picks one: sign(shared) * own.

    Args:
        pairs: (N, F) gaps; which side was chosen does not matter.
    """
    own = pairs @ heads.T
    largest = np.abs(own).max(0).clip(min=np.finfo(np.float64).tiny)  # squares of large rewards would overflow
    spread = largest * np.sqrt(((own / largest) ** 2).mean(0)).clip(min=1e-12)
    own = own / spread
    logs = np.zeros(len(heads))  # the adversary's
    best, least = logs, -np.inf
    for _ in range(GAME_ROUNDS):
        gains = (np.sign(own @ softmax(logs))[:, None] * own).mean(0)
        if gains.min() > least:
            best, least = logs, float(gains.min())
        logs = logs - GAME_RATE * gains
        logs = logs - logs.max()
    found: Floats = best - np.log(spread)
    found -= found.max()
    return found


def softmax(logs: Floats) -> Floats:
    """Weights of the largest are 1 before they are normalised: nothing overflows."""
    weights = np.exp(logs - logs.max())
    found: Floats = weights / weights.sum()
    return found


def _learn(choices: Choices, *, seed: int, groups: int) -> MaxMin:
    scale = choices.gaps.std(0).clip(min=1e-9)
    chosen, rejected = choices.scaled(scale)
    gaps = chosen - rejected
    names, place = np.unique(choices.users, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    heads, member = find_groups(gaps, torch.from_numpy(place), len(names), groups, generator)
    there = torch.unique(member)  # groups that nobody is in have no say
    found = heads[there].numpy()
    return MaxMin(found, weigh_groups(found, gaps.numpy()), scale)
