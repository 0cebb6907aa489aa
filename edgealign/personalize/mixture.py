"""MiCRo: a few linear reward heads, a router between them, and Hedge for a user's labels (arXiv 2505.24846).

    loss   = -mean log sum_k f_k(prompt) sigmoid(margin_k) + ENTROPY mean sum_k f_k log f_k
    user   : omega_k ~ f_k(prompt) exp(-sum_i L_ik / tau),   L_ik = -log sigmoid(margin_ik)

As in the paper: linear heads, a linear router on the prompt's features (as in its code), the pull towards uniform with
weight 0.5, Hedge. Ours: a user's labels re-weight the heads for all prompts (the paper does it by example), and tau is
chosen on held-out users. Without prompts the router has nothing to go by, and single pairs cannot tell heads apart;
then all choices of a seen user come from one head: the mixture is over users.

A user is the K logarithms of the weights that the labels give; 0: the router's alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from edgealign.errors import UsageError
from edgealign.personalize.heads import Choices, Floats, State, learn_calibrated, minimise
from edgealign.personalize.lore import fit_population

HEADS_COUNT, STEPS, RIDGE, ENTROPY, SPREAD = 8, 100, 1e-3, 0.5, 0.5
TAUS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 1e6)  # the last: labels are not heard


@dataclass(frozen=True)
class Mixture:
    """`router` (P = 0 where no prompts were given) and `constant`: logits of the heads before any label."""

    heads: Annotated[Floats, "K F"]
    router: Annotated[Floats, "P K"]
    constant: Annotated[Floats, "K"]
    scale: Annotated[Floats, "F"]
    tau: float = 1.0
    name: ClassVar[str] = "micro"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, heads: int = HEADS_COUNT) -> Mixture:
        return learn_calibrated(partial(_learn, seed=seed, heads=heads), choices, "tau", TAUS, seed)

    @property
    def state_size(self) -> int:
        return len(self.constant)

    def fit(self, choices: Choices) -> State:
        return hedge(self._by_head(choices), self.tau)

    def margins(self, state: State, pairs: Choices) -> Floats:
        """The mixture's log-odds: heads vote with probabilities, not with rewards."""
        by_head = self._by_head(pairs)
        weights = self._router(pairs) + state.astype(np.float64)
        found: Floats = _log_sum(weights - np.logaddexp(0, -by_head)) - _log_sum(weights - np.logaddexp(0, by_head))
        return found

    def _by_head(self, pairs: Choices) -> Floats:
        """(N, K)"""
        chosen, rejected = pairs.scaled(self.scale)
        found: Floats = (chosen - rejected).numpy() @ self.heads.T
        return found

    def _router(self, pairs: Choices) -> Floats:
        """(N, K) logits."""
        width = self.router.shape[0]
        if not width:
            return np.broadcast_to(self.constant, (len(pairs), len(self.constant)))
        if pairs.prompts is None or pairs.prompts.shape[1] != width:
            raise UsageError("micro", f"was learned with {width} prompt features, which are not here", "give prompts")
        found: Floats = pairs.prompts @ self.router + self.constant
        return found


def hedge(by_head: Floats, tau: float) -> State:
    """(N, K) margins of a user's choices -> (K,) logarithms of what the labels make of each head's weight, mean 0."""
    loss = np.logaddexp(0, -by_head).sum(0) / tau
    found: State = (loss.mean() - loss).astype(np.float32)
    return found


def _learn(choices: Choices, *, seed: int, heads: int) -> Mixture:
    """Heads start around everybody's direction."""
    scale = choices.gaps.std(0).clip(min=1e-9)
    chosen, rejected = choices.scaled(scale)
    gaps = chosen - rejected
    names, place = np.unique(choices.users, return_inverse=True)
    prompts = None if choices.prompts is None else torch.from_numpy(choices.prompts.astype(np.float64))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(heads, gaps.shape[1], generator=generator, dtype=torch.float64) / gaps.shape[1] ** 0.5
    bank = fit_population(gaps, RIDGE) + SPREAD * noise * (heads > 1)
    router = torch.zeros(0 if prompts is None else prompts.shape[1], heads, dtype=torch.float64)
    parts = [bank, router, torch.zeros(heads, dtype=torch.float64)]
    groups, count = (torch.from_numpy(place), len(names)) if prompts is None else (torch.arange(len(gaps)), len(gaps))

    def loss() -> Tensor:
        logits = parts[2].expand(count, heads) if prompts is None else prompts @ parts[1] + parts[2]
        weights = torch.log_softmax(logits, -1)
        right = torch.nn.functional.logsigmoid(gaps @ parts[0].T)
        summed = torch.zeros(count, heads, dtype=torch.float64).index_add(0, groups, right)
        fit = -torch.logsumexp(weights + summed, -1).sum() / len(gaps)
        uniform = (weights.exp() * weights).sum(-1).mean()
        value: Tensor = fit + ENTROPY * uniform + 0.5 * RIDGE * (parts[0] ** 2).sum() / heads
        return value

    found = [part.numpy() for part in minimise(parts, loss, STEPS)]
    return Mixture(found[0], found[1], found[2], scale)


def _log_sum(values: Floats) -> Floats:
    found: Floats = np.logaddexp.reduce(values, axis=-1)
    return found
