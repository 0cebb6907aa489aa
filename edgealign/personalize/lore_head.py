"""LoRe behind the interface of reward heads: ours (lore.py), and as released, to compare with.

As released (facebookresearch/LoRe, read, not copied): reward directions and softmax weights of all seen users by one
Adam, then 500 Adam steps from random weights for a new user. Ours in it: without any choice a user has the mean weights
of the seen users, because the released code has nobody in particular.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch

from edgealign.personalize.heads import Choices, Floats, State
from edgealign.personalize.lore import Basis, fit_released, fit_users, learn_basis

RELEASED_STEPS, RELEASED_RATE, RELEASED_SCALE = 1000, 0.5, 100.0


@dataclass(frozen=True)
class Lore:
    """Everybody's direction and a user's signed weights of the others, by MAP."""

    mean: Annotated[Floats, "F"]
    directions: Annotated[Floats, "F B"]
    scale: Annotated[Floats, "F"]
    name: ClassVar[str] = "lore"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, rank: int = 8) -> Lore:
        basis = learn_basis(choices.gaps, choices.users, rank=rank, seed=seed)
        return cls(basis.mean, basis.directions, basis.scale)

    @property
    def state_size(self) -> int:
        return int(self.directions.shape[1])

    def fit(self, choices: Choices) -> State:
        found: State = fit_users(self._project(choices)[None]).weights[0].astype(np.float32)
        return found

    def margins(self, state: State, pairs: Choices) -> Floats:
        projected = self._project(pairs).numpy()
        found: Floats = projected[:, 0] + projected[:, 1:] @ state.astype(np.float64)
        return found

    def _project(self, choices: Choices) -> torch.Tensor:
        choices.scaled(self.scale)
        return Basis(self.mean, self.directions, self.scale).project(choices.gaps)


@dataclass(frozen=True)
class LoreReleased:
    """Softmax weights of reward directions; `usual`: the seen users' mean weights."""

    directions: Annotated[Floats, "F B"]
    usual: Annotated[Floats, "B"]
    scale: Annotated[Floats, "F"]
    name: ClassVar[str] = "lore-released"

    @classmethod
    def learn(cls, choices: Choices, *, seed: int = 0, rank: int = 8, steps: int = RELEASED_STEPS) -> LoreReleased:
        scale = choices.gaps.std(0).clip(min=1e-9)
        gaps = torch.from_numpy(choices.gaps / scale)
        _, place = np.unique(choices.users, return_inverse=True)
        who = torch.from_numpy(place)
        share = 1 / torch.bincount(who).double()[who]  # each user's mean loss
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(gaps.shape[1], rank, generator=generator, dtype=torch.float64)
        raw = torch.randn(int(who.max()) + 1, rank, generator=generator, dtype=torch.float64)
        optimizer = torch.optim.Adam([directions.requires_grad_(), raw.requires_grad_()], lr=RELEASED_RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            margin = ((gaps @ directions) * torch.softmax(raw, -1)[who]).sum(1) / RELEASED_SCALE
            (torch.nn.functional.softplus(-margin) * share).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        usual = torch.softmax(raw.detach(), -1).mean(0)
        return cls((directions.detach() / RELEASED_SCALE).numpy(), usual.numpy(), scale)

    @property
    def state_size(self) -> int:
        return len(self.usual)

    def fit(self, choices: Choices) -> State:
        if not len(choices):
            return self.usual.astype(np.float32)
        projected = torch.from_numpy(self._gaps(choices) @ self.directions)
        found: State = fit_released(projected[None])[0].astype(np.float32)
        return found

    def margins(self, state: State, pairs: Choices) -> Floats:
        found: Floats = self._gaps(pairs) @ self.directions @ state.astype(np.float64)
        return found

    def _gaps(self, choices: Choices) -> Floats:
        chosen, rejected = choices.scaled(self.scale)
        found: Floats = (chosen - rejected).numpy()
        return found
